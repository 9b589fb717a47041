"""Draw an image set with LLaVA-style records: plain scenes, and image files that are easily read wrongly."""

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, features

COLOURS = {"red": (220, 30, 40), "green": (30, 160, 60), "blue": (40, 70, 210), "yellow": (240, 210, 50)}
SHAPES = ("circle", "square", "triangle")
PROMPT = "Render a clear and concise summary of the photo.\n<image>"
PLAIN = len(COLOURS) * len(SHAPES)


@dataclass(frozen=True)
class ImageSet:
    """Files on disk, shared by the whole test session: a test that changes one works on a copy."""

    folder: Path  # the image folder
    json: Path  # records as one JSON array
    jsonl: Path  # the same as JSON Lines
    records: list  # the same, as Python objects

    @property
    def keys(self):
        """The image keys, each once, in the order of their first record."""
        return list(dict.fromkeys(record["image"] for record in self.records))

    @property
    def captions(self):
        """Each record's caption, in order."""
        return [record["conversations"][1]["value"] for record in self.records]


def draw(size, colour, shape="circle", mode="RGB", background=(235, 235, 230)):
    """Draw one shape on a shaded background, so that rows and columns differ."""
    width, height = size
    picture = Image.new("RGB", size, background)
    pen = ImageDraw.Draw(picture)
    for x in range(0, width, 4):
        pen.line([(x, 0), (x, height)], fill=tuple(max(0, c - 60 * x // width) for c in background))
    box = [width * 0.2, height * 0.15, width * 0.7, height * 0.75]
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    else:
        pen.polygon([(box[0], box[3]), (box[2], box[3]), ((box[0] + box[2]) / 2, box[1])], fill=colour)
    return picture.convert(mode)


def transparent():
    """Draw a circle with a gradient of alpha: compositing gives other pixels than dropping alpha."""
    picture = draw((70, 64), COLOURS["red"], mode="RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def odd_pictures(folder):
    """Write the odd files; return {key: caption}."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees for display
    sixteen_bit = Image.new("I;16", (60, 60))
    sixteen_bit.putdata([x * 4 + y * 4 for y in range(60) for x in range(60)])  # 255 and more becomes white
    frames = [draw((64, 60), COLOURS["blue"]), draw((64, 60), COLOURS["red"], "square")]

    def save(key, picture, **options):
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / key, **options)

    save("odd/transparent.png", transparent())
    save("odd/palette.png", draw((61, 83), COLOURS["green"], "square").quantize(16))
    save("odd/gray.jpg", draw((90, 60), COLOURS["blue"], mode="L"))
    save("odd/gray_alpha.png", draw((58, 58), COLOURS["red"], "triangle", mode="LA"))
    save("odd/sixteen_bit.png", sixteen_bit)
    save("odd/cmyk.jpg", draw((72, 66), COLOURS["yellow"], "square", mode="CMYK"))
    save("odd/animated.gif", frames[0], save_all=True, append_images=frames[1:], duration=50)
    save("odd/turned.jpg", draw((96, 60), COLOURS["yellow"], "triangle"), exif=exif)
    save("odd/one_pixel.png", Image.new("RGB", (1, 1), (200, 100, 50)))
    save("odd/three_rows.png", draw((40, 3), COLOURS["blue"], "square"))
    save("odd/one_row.png", draw((33, 1), COLOURS["green"], "square"))
    save("odd/wide.png", draw((280, 20), COLOURS["red"], "square"))
    save("odd/tall.jpg", draw((18, 260), COLOURS["green"], "circle"))
    save("odd/übersicht 雪.png", draw((60, 50), COLOURS["blue"], "triangle"))
    save("odd/same_name.png", draw((60, 60), COLOURS["red"], "circle"))
    save("other/same_name.png", draw((60, 60), COLOURS["blue"], "square"))
    captions = {
        "odd/transparent.png": "a red circle that fades",
        "odd/palette.png": "a green square in sixteen colours",
        "odd/gray.jpg": "a gray circle",
        "odd/gray_alpha.png": "  two leading spaces and a gray triangle",
        "odd/sixteen_bit.png": "a ramp from black to white",
        "odd/cmyk.jpg": "a yellow square, printed",
        "odd/animated.gif": "a blue circle, then a red square",
        "odd/turned.jpg": "a yellow triangle lying on its side\nand a second line",
        "odd/one_pixel.png": "",
        "odd/three_rows.png": "three rows of blue",
        "odd/one_row.png": "ein grüner Streifen — 緑の線 🟩",
        "odd/wide.png": " a wide red square",
        "odd/tall.jpg": "a tall green circle ",
        "odd/übersicht 雪.png": "雪の中の青い三角",
        "odd/same_name.png": "a red circle",
        "other/same_name.png": "a blue square",
    }
    if features.check("webp"):
        save("odd/lossless.webp", draw((66, 60), COLOURS["green"], "triangle"), lossless=True)
        captions["odd/lossless.webp"] = "a green triangle"
    return captions


def plain_pictures(folder):
    """Write one scene for each colour and shape, as JPEG or PNG, in two folders; return {key: caption}."""
    captions = {}
    for index, (colour, shape) in enumerate((c, s) for c in COLOURS for s in SHAPES):
        key = f"{index % 2:05d}/{index:09d}.{'jpg' if index % 3 else 'png'}"
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        draw((64 + 3 * index, 80 - 2 * index), COLOURS[colour], shape).save(folder / key)
        captions[key] = f"a {colour} {shape} on a pale ground"
    return captions


def make_record(identity, key, caption, prompt=PROMPT):
    """Return one record in the format of LLaVA's stage-1 JSON."""
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": caption}]
    return {"id": identity, "image": key, "conversations": turns}


def write_records(records, path):
    """Write records as a JSON array, or as JSON Lines if `path` ends in .jsonl; return `path`."""
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    else:
        text = json.dumps(records, ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


def write_image_set(root):
    """Draw every picture below `root`/images and write `records.json` and `records.jsonl`; return the ImageSet.

    The first image has two records, so there is one record more than images. The first PLAIN records are the plain
    scenes; the odd files follow.
    """
    folder = root / "images"
    folder.mkdir(parents=True)
    captions = {**plain_pictures(folder), **odd_pictures(folder)}
    records = [make_record(f"{index:04d}", key, caption) for index, (key, caption) in enumerate(captions.items())]
    first = records[0]["image"]
    records.append(make_record("again", first, "the first picture once more", prompt="<image>\nWhat is this?"))
    json_path = write_records(records, root / "records.json")
    return ImageSet(folder, json_path, write_records(records, root / "records.jsonl"), records)

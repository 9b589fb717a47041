"""The extraction's command line: how flags reach the records."""

import drawn


def test_absolute_image_paths_inside_the_image_folder_are_found(server, command, image_set, tmp_path):
    records = [{**record, "image": str(image_set.folder / record["image"])} for record in image_set.records]
    data = drawn.write_records(records, tmp_path / "absolute.json")
    log = server.run([*command(data_path=data), "--plan"])
    assert "to encode   29, of which 0 are missing" in log


def test_absolute_image_paths_outside_the_image_folder_are_refused(server, command, image_set, tmp_path):
    data = drawn.write_records([drawn.make_record("1", "/elsewhere/a.jpg", "x")], tmp_path / "absolute.json")
    log = server.run(command(data_path=data), expect=1)
    assert f"image path '/elsewhere/a.jpg' must stay inside --image_folder {image_set.folder}" in log

"""The dataset card of a cache on the Hugging Face Hub."""

from __future__ import annotations

from llava_twophase.cache.reader import FeatureCache
from llava_twophase.inspection import output
from llava_twophase.inspection.summary import codec_in_words, made_by, summarize
from llava_twophase.text import format_bytes

_TEMPLATE = """\
---
pretty_name: Patch features of a frozen vision tower
tags:
- feature-cache
- llava
- llava-twophase
size_categories:
- {category}
---

# Patch features for LLaVA-1.5 stage 1

{made_by}

| | |
|---|---|
| images | {images:,} |
| shards | {shards:,} |
| size | {size} |
| features of an image | {tokens} tokens x {width} |
| storage | {codec} |

Train a projector from these features, without the images and the vision tower:

```
pip install 'llava-twophase[remote]'
llava-train-projector --feature_cache {url} ...
llava-inspect-cache pull {url} caches/features
```

The keys are image paths relative to the image folder. The licence of the images applies to their features.

## Fingerprint

These settings change a value. Training compares them with its flags.

| field | value |
|---|---|
{fingerprint}
"""
_CATEGORIES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))


def dataset_card(cache: FeatureCache, url: str) -> str:
    """Return the card as Markdown with metadata, as the Hub reads ``README.md``.

    Args:
        cache: The cache.
        url: Where it will be.
    """
    values = summarize(cache.path)
    fields = output.flatten(cache.fingerprint)
    return _TEMPLATE.format(
        category=next((name for limit, name in _CATEGORIES if len(cache) < limit), "n>10M"),
        made_by=made_by(cache),
        images=values["images"],
        shards=values["shards"],
        size=format_bytes(values["bytes"]),
        tokens=values["tokens"],
        width=values["width"],
        codec=codec_in_words(values),
        url=url,
        fingerprint="\n".join(f"| {name} | {str(text).replace('|', '/')} |" for name, text in fields.items()),
    )

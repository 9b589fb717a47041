"""Plans of runs that were interrupted, and of larger second runs."""

from cache.make import make_cache
from llava_twophase.cache.manifest import read_manifest
from llava_twophase.extract.plan import make_plan


def test_make_plan_does_not_depend_on_sealed_shards(tmp_path):
    """Planned again after any shard was sealed, the remaining work and the digest are the same."""
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(4, 4, 4))
    manifest = read_manifest(cache)
    fresh = make_plan(tmp_path / "nothing", None, keys, 4, lambda entries: set())
    manifest.plan = {"first_shard": 0, "digest": fresh.digest}
    manifest.complete = False
    manifest.shards = []
    for number in (1, 0, 2):
        (cache / "shards" / f"shard-00000{number}.h5").unlink()
        manifest.shards = [entry for entry in manifest.shards if str(number) not in entry.file]
        plan = make_plan(cache, manifest, keys, 4, lambda entries: set())
        assert plan.resumes and plan.digest == fresh.digest
        gone = {shard.number for shard in plan.work}
        assert number in gone and [shard.keys for shard in plan.work] == [fresh.work[n].keys for n in sorted(gone)]


def test_make_plan_keeps_sealed_shards_with_another_shard_size(tmp_path):
    cache, keys, _ = make_cache(tmp_path / "cache", counts=(4, 4))
    more = [*keys, *(f"new/{row}.jpg" for row in range(5))]
    plan = make_plan(cache, read_manifest(cache), more, 2, lambda entries: set())
    assert not plan.resumes and plan.cached == 8
    assert [(shard.number, len(shard.keys)) for shard in plan.work] == [(2, 2), (3, 2), (4, 1)]

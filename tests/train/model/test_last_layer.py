"""LastLayer: positions whose output is not read are not computed."""

from train.model.llms import PATCHES, build_batch, build_llm, freeze


def test_last_layer_computes_only_the_positions_that_are_read():
    llm, seen = build_llm(), []
    layer = llm.model.layers[-1]
    for part in (layer.self_attn.k_proj, layer.mlp.down_proj):
        part.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    features, ids, labels, _ = build_batch((4, 4))
    freeze(llm, 1, 2, 0).loss(features, ids, labels)
    positions = ids.shape[1] - 1 + PATCHES
    assert seen == [positions, positions - PATCHES]  # the last image position is read, as is every caption token

"""Training through the API beside the extension. The UI refuses it under `--lowvram`; the API does not ask.

Gradients are on, the model is moved with `.to()` by API threads without any lock, and attention and checkpointing functions
are swapped meanwhile. What is trained must be what stock trains, bit for bit, and so must the next picture.
On a CPU stock can train under `--lowvram`; on a GPU it finds its weights on two devices and says so in `info`.
"""

# ruff: noqa: F811 - the fixtures are imported

from __future__ import annotations

import make_fixtures
import pytest
from pair_fixtures import JOB, QUARTER_AND_AUTOMATIC, needs_servers, pair, servers  # noqa: F401
from test_e2e_features import attention_widths

pytestmark = needs_servers

TOKEN = "picture"
"""The only word of the template none.txt: the embedding of this name is in every training prompt."""


@pytest.fixture
def data(pair, tmp_path):
    """What is trained on. The host would write its settings into a folder that it only makes for other files."""
    with pair.options(save_training_settings_to_txt=False):
        yield make_fixtures.write_training_data(tmp_path / "data")


def order(data, log, steps, **more):
    """All the host asks for. Pictures drawn on the way have a seed only as `preview_from_txt2img`."""
    return {
        "id_task": "feat", "learn_rate": "0.05", "batch_size": 1, "gradient_step": 1, "data_root": str(data), "log_directory": str(log),
        "training_width": 64, "training_height": 64, "varsize": False, "steps": steps, "clip_grad_mode": "disabled", "clip_grad_value": 0.1,
        "shuffle_tags": False, "tag_drop_out": 0, "latent_sampling_method": "once", "use_weight": False, "create_image_every": 0,
        "template_filename": "none.txt", "preview_from_txt2img": True, "preview_prompt": "a dog", "preview_negative_prompt": "",
        "preview_steps": 2, "preview_sampler_name": "Euler a", "preview_cfg_scale": 7, "preview_seed": 1, "preview_width": 64,
        "preview_height": 64, **more,
    }  # fmt: skip


def told(answer, folder):
    """What the host says of it, without its folders."""
    return answer["info"].replace(str(folder), "")


@QUARTER_AND_AUTOMATIC
@pytest.mark.parametrize("pictures_every", [0, 2])
def test_train_an_embedding(pair, data, tmp_path, pictures_every):
    plain = pair.same("before training")
    job = {**JOB, "prompt": f"a {TOKEN} of a dog"}
    created, trained, said, got = [], [], [], []
    folders = pair.flags("embeddings_dir")
    try:
        for server, folder in zip(pair.servers, folders, strict=True):
            path = folder / f"{TOKEN}.pt"
            start = {"name": TOKEN, "num_vectors_per_token": 2, "overwrite_old": True, "init_text": "dog"}
            server.post("/sdapi/v1/create/embedding", start)
            server.post("/sdapi/v1/refresh-embeddings", {})  # the host would not look again at a file it knows
            created.append(vectors_of(path))
            server.pictures("txt2img", JOB)  # its seed is that of the training, too
            details = {"embedding_name": TOKEN, "save_embedding_every": 0, "save_image_with_stored_embedding": False}
            details["create_image_every"] = pictures_every
            said.append(told(server.post("/sdapi/v1/train/embedding", order(data, tmp_path / "log", 3, **details)), folder))
            trained.append(vectors_of(path))
            before = pair.ours.status()
            got.append(server.pictures("txt2img", job))
            if server is pair.ours:
                after = pair.ours.status()
                worked_before = before
        print(f"\n{pair.budget} | trained embedding | ours {trained[0]} | stock {trained[1]} | {said[0]}")
        assert said[0] == said[1]
        assert created[0] == created[1]
        assert trained[0] == trained[1]
        if "error: None" in said[0]:
            assert trained[0] != created[0], "nothing was trained"
        pair.judge("with the trained embedding", *got, worked_before, after, expect=None)
    finally:
        for folder in folders:
            for leftover in folder.glob(f"{TOKEN}.pt*"):
                leftover.unlink()
        pair.both("/sdapi/v1/refresh-embeddings", {})
    assert pair.same("after training", expect=None) == plain
    pair.same("and again")


def vectors_of(path):
    return make_fixtures.hash_tensors(make_fixtures.read_torch(path)["string_to_param"].values())


@QUARTER_AND_AUTOMATIC
@pytest.mark.parametrize("unload", [False, True])
def test_train_a_hypernetwork(pair, data, tmp_path, unload):
    """`unload`: the host's option to move VAE and text encoder to main memory meanwhile."""
    plain = pair.same("before training")
    sizes = list(attention_widths(pair))
    trained, said, got = [], [], []
    folders = pair.flags("hypernetwork_dir")
    with pair.options(unload_models_when_training=unload):
        for number, (server, folder) in enumerate(zip(pair.servers, folders, strict=True)):
            name = f"feat-trained-{number}"
            server.pictures("txt2img", JOB)  # its seed is that of the weights and the training, too
            shape = {"enable_sizes": sizes, "layer_structure": [1, 2, 1], "activation_func": "linear", "weight_init": "Normal"}
            server.post("/sdapi/v1/create/hypernetwork", {"name": name, "overwrite_old": True, **shape})
            details = {"hypernetwork_name": name, "save_hypernetwork_every": 0, "learn_rate": "0.001"}
            said.append(told(server.post("/sdapi/v1/train/hypernetwork", order(data, tmp_path / "log", 3, **details)), folder))
            parts = make_fixtures.read_torch(folder / f"{name}.pt")
            tensors = [tensor for size in sizes for half in parts[size] for _, tensor in sorted(half.items())]
            trained.append((parts["step"], make_fixtures.hash_tensors(tensors)))
            before = pair.ours.status()
            got.append(server.pictures("txt2img", {**JOB, "prompt": f"{JOB['prompt']} <hypernet:{name}:1>"}))
            if server is pair.ours:
                after, worked_before = pair.ours.status(), before
    print(f"\n{pair.budget} | trained hypernetwork | ours {trained[0]} | stock {trained[1]} | {said[0]}")
    assert said[0].replace("-0", "") == said[1].replace("-1", "")
    assert trained[0] == trained[1]
    pair.judge("with the trained hypernetwork", *got, worked_before, after, expect=None)
    assert pair.same("after training", expect=None) == plain
    pair.same("and again")

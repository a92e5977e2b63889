"""What `open_saes` finds, what it refuses, and that every problem is said at once."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata

from stethoscope.errors import SAEError
from stethoscope.saes.sources import check_fit, load_sae, open_saes, site_of


def write_sae(folder: Path, hook_name: str, *, d_in: int = 8, width: int = 16) -> Path:
    """A real SAELens SAE on disk."""
    torch.manual_seed(0)
    sae = StandardSAE(
        StandardSAEConfig(d_in=d_in, d_sae=width, metadata=SAEMetadata(hook_name=hook_name, model_name="tiny/llama"))
    )
    sae.save_model(folder)
    return folder


@pytest.fixture
def saes(tmp_path: Path) -> Path:
    for layer in (10, 2, 0):
        write_sae(tmp_path / "saes" / f"layer_{layer}", f"model.layers.{layer}")
    return tmp_path / "saes"


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("hook_name", "expected"),
    [
        ("blocks.12.hook_resid_post", (12, "resid_post")),
        ("blocks.3.hook_mlp_out", (3, "mlp_out")),
        ("blocks.0.hook_attn_out", (0, "attn_out")),
        ("model.layers.12", (12, "resid_post")),
        ("model.layers.12.output", (12, "resid_post")),
        ("model.language_model.layers.7.mlp", (7, "mlp_out")),
        ("model.layers.4.self_attn", (4, "attn_out")),
        ("transformer.h.5", (5, "resid_post")),
    ],
)
def test_hook_names_of_both_styles_are_understood(hook_name: str, expected: tuple[int, str]) -> None:
    assert site_of(hook_name) == expected


@pytest.mark.parametrize(
    "hook_name", ["blocks.1.hook_resid_pre", "blocks.1.attn.hook_z", "lm_head", "layers.x", "h.1.foo"]
)
def test_an_unknown_site_is_refused_by_name(hook_name: str) -> None:
    with pytest.raises(SAEError) as caught:
        site_of(hook_name)
    assert f"`{hook_name}`" in str(caught.value)


def test_a_folder_gives_its_saes_in_order_of_depth(saes: Path) -> None:
    found = open_saes(saes)
    assert list(found) == [0, 2, 10]
    assert (found[2].site, found[2].width, found[2].d_in, found[2].architecture) == ("resid_post", 16, 8, "standard")
    assert found[2].model_name == "tiny/llama"
    check_fit(found, hidden_size=8, num_layers=11, model_name="tiny/llama")


def test_a_pattern_and_a_mapping_pick_the_same(saes: Path) -> None:
    write_sae(saes / "other", "model.layers.2")
    by_pattern = open_saes(saes, sae_id="layer_{layer}")
    assert by_pattern == open_saes({layer: saes / f"layer_{layer}" for layer in (0, 2, 10)})
    assert open_saes(saes / "other").keys() == {2}


def test_the_hash_follows_the_bytes(saes: Path) -> None:
    first = open_saes(saes)[2].sha256
    assert first == open_saes(saes)[2].sha256
    edit_config(saes / "layer_2", note="changed")
    assert first != open_saes(saes)[2].sha256


def test_loading_gives_what_sae_lens_gives(saes: Path) -> None:
    ours, theirs = load_sae(open_saes(saes)[2]), SAE.load_from_disk(saes / "layer_2")
    x = torch.randn(5, 8)
    assert torch.equal(ours.encode(x), theirs.encode(x))
    assert ours.W_dec.dtype == torch.float32
    assert not ours.W_enc.requires_grad


def test_every_problem_of_reading_is_said_at_once(saes: Path) -> None:
    write_sae(saes / "a_twin", "model.layers.10")
    edit_config(write_sae(saes / "b_transcoder", "model.layers.1"), architecture="transcoder")
    edit_config(write_sae(saes / "c_lying", "model.layers.3"), d_sae=99)
    (write_sae(saes / "d_hollow", "model.layers.4") / "sae_weights.safetensors").unlink()
    (write_sae(saes / "e_torn", "model.layers.5") / "cfg.json").write_text("{")
    write_sae(saes / "f_elsewhere", "blocks.6.hook_resid_pre")
    weights = write_sae(saes / "g_cut", "model.layers.7") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    edit_config(write_sae(saes / "h_typo", "model.layers.8"), d_in="eight")
    with pytest.raises(SAEError) as caught:
        open_saes(saes)
    text = str(caught.value)
    for said in (
        "layer 10: both",
        "`transcoder` is not supported",
        "`W_enc` should have shape (8, 99), the file has (8, 16)",
        "d_hollow",
        "`cfg.json` cannot be read",
        "`blocks.6.hook_resid_pre`",
        "g_cut",
        "`d_in` is `eight`",
        "hint: ",
    ):
        assert said in text


def test_every_misfit_is_said_at_once(saes: Path) -> None:
    shutil.rmtree(saes / "layer_2")
    write_sae(saes / "layer_2", "model.layers.2", d_in=12)
    write_sae(saes / "mlp", "blocks.1.hook_mlp_out")
    with pytest.raises(SAEError) as caught:
        check_fit(open_saes(saes), hidden_size=8, num_layers=10)
    assert str(caught.value).splitlines()[0] == "the SAEs do not fit the base model"
    assert [problem.split(", from")[0] for problem in caught.value.problems] == [
        "layer 1: the site `mlp_out` is not one of resid_post",
        "layer 2: the SAE reads 12 values, the model's hidden size is 8",
        "layer 10: the model has 10 layers, 0 to 9 (`model.layers.10`)",
    ]
    assert "tiny/llama" in (caught.value.hint or "")


def test_a_mapping_with_the_wrong_layer_is_refused(saes: Path) -> None:
    with pytest.raises(SAEError, match="layer 3: the SAE reads layer 2"):
        open_saes({3: saes / "layer_2"})


@pytest.mark.parametrize("sae_id", ["layer_3", "../{layer}", "/{layer}"])
def test_a_pattern_that_cannot_work_is_refused(saes: Path, sae_id: str) -> None:
    with pytest.raises(SAEError, match="no pattern"):
        open_saes(saes, sae_id=sae_id)


def test_nothing_found_says_what_is_there(saes: Path, tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="layer_10"):
        open_saes(saes, sae_id="resid_{layer}")
    with pytest.raises(SAEError, match="no SAEs in"):
        open_saes(saes / "layer_0" / "..", sae_id=None) if (saes / "cfg.json").exists() else open_saes(tmp_path)
    with pytest.raises(SAEError, match="there is no folder"):
        open_saes(tmp_path / "absent")


def test_another_model_name_is_logged_not_refused(saes: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_fit(open_saes(saes), hidden_size=8, num_layers=11, model_name="/models/Other")
    assert "tiny/llama" in caplog.text

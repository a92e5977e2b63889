"""SAE folders of every layout whose files are damaged: an error for the user, or an SAE that encodes finite values."""

import shutil

import pytest
import torch
from hostile import assert_no_tracebacks, damage
from safetensors.torch import load_file, save_file
from test_formats import CASES, W, change, dictionary, gemma_scope_1, llama_scope, refusal, sae_lens

from stethoscope.errors import SAEError
from stethoscope.saes.open import load_sae, open_saes, read_folder

LAYOUTS = [
    "sae_lens, topk", "sae_lens, gated", "sae_lens, flat jumprelu", "sae_lens, batchtopk as its trainer saves it",
    "sparsify, topk of an MLP", "gemma scope 2, affine transcoder", "gemma scope 1, res", "llama scope, jumprelu",
    "dictionary_learning, AutoEncoderTopK", "dictionary_learning, JumpReluAutoEncoder", "qwen scope, topk",
]  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_damaged_sae_is_refused_or_sound(name, tmp_path):
    torch.manual_seed(0)
    path = CASES[name](tmp_path / "sound").path.relative_to(tmp_path / "sound")

    def case(chance):
        shutil.rmtree(tmp_path / "case", ignore_errors=True)
        whole = shutil.copytree(tmp_path / "sound", tmp_path / "case")
        damage(chance.choice(sorted(file for file in whole.rglob("*") if file.is_file())), chance)
        (folder,) = open_saes(whole / path if (whole / path).is_dir() else (whole / path).parent).values()
        assert load_sae(folder).encode(torch.zeros(2, folder.d_in)).isfinite().all()

    assert_no_tracebacks(name, 30, case)


def spoiled(case, file, table, **values):
    change(file, table, **values)(case.path)
    return case.path


@pytest.mark.parametrize("k", [0, -1, W + 1, None, 2.5, True])
def test_a_k_that_no_width_has_is_refused_before_loading(k, tmp_path):
    assert "`k` is" in refusal(spoiled(sae_lens(tmp_path / "a", "topk"), "cfg.json", None, k=k))
    path = spoiled(dictionary(tmp_path / "b", "AutoEncoderTopK"), "config.json", "trainer", k=k)
    tensors = torch.load(path / "ae.pt", weights_only=True)
    torch.save({name: value for name, value in tensors.items() if name != "k"}, path / "ae.pt")
    assert "`k` is" in refusal(path)
    if type(k) is int:
        torch.save(tensors | {"k": torch.tensor(k)}, path / "ae.pt")
        with pytest.raises(SAEError, match=r"`k` is `-?\d+`"):
            load_sae(read_folder(path))


@pytest.mark.parametrize("value", [0, -1.5, "x", float("nan"), float("inf")])
def test_a_norm_that_nothing_can_be_divided_by_is_refused(value, tmp_path):
    path = spoiled(llama_scope(tmp_path), "hyperparams.json", "dataset_average_activation_norm", **{"in": value})
    assert "`average norm`" in refusal(path)
    path = spoiled(sae_lens(tmp_path / "b", "flat jumprelu"), "cfg.json", None, norm_scaling_factor=value)
    assert "`norm_scaling_factor`" in refusal(path)


def test_a_layer_that_contradicts_the_hook_is_refused(tmp_path):
    path = spoiled(sae_lens(tmp_path, "flat jumprelu"), "cfg.json", None, hook_layer=4)
    assert "`hook_layer` is `4`, but it reads `blocks.3.hook_resid_post`" in refusal(path)


def test_an_archive_without_arrays_or_with_a_lying_header_is_refused(tmp_path):
    path = gemma_scope_1(tmp_path).path / "params.npz"
    sound = path.read_bytes()
    path.write_bytes(b"PK\x05\x06" + bytes(18))
    assert "`params.npz` holds no tensors" in refusal(path.parent)
    path.write_bytes(sound.replace(b"'shape': (12, 40)", b"'shape': (12, 99)"))
    assert "`params.npz` is damaged" in refusal(path.parent)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_or_infinity_is_named_by_layer_tensor_and_file(value, tmp_path):
    path = sae_lens(tmp_path, "jumprelu").path
    file = path / "sae_weights.safetensors"
    tensors = load_file(file)
    tensors["W_dec"][3, 1] = value
    save_file(tensors, file)
    with pytest.raises(SAEError) as caught:
        load_sae(read_folder(path))
    for part in ("layer 3", "infinity in `W_dec`", str(file)):
        assert part in str(caught.value)

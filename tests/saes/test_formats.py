"""Every layout as published, on random weights: encode and decode must equal a plain formula, and SAELens' own reading
where that is right."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from stethoscope.errors import SAEError
from stethoscope.saes.open import SAEFolder, load_directions, load_sae, read_folder

D, W, K = 12, 40, 5
Weights = dict[str, Tensor]
Reading = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A folder as published; what its SAE is; the formulas; and SAELens' loader, where it reads the layout rightly."""

    path: Path
    place: tuple[int, str, str | None]
    architecture: str
    encode: Reading
    decode: Reading
    loader: Callable[[], tuple[dict[str, Any], Weights]] | None = None


def random(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape)


def weights(*, threshold: bool = True) -> Weights:
    """Random weights in SAELens' names, decoder rows of any norm."""
    drawn = {"W_enc": random(D, W, scale=0.4), "W_dec": random(W, D), "b_enc": random(W, scale=0.3), "b_dec": random(D)}
    return drawn | ({"threshold": random(W, scale=0.5).abs()} if threshold else {})


def relu(z: Tensor) -> Tensor:
    return z.clamp(min=0)


def top(z: Tensor) -> Tensor:
    return torch.zeros_like(z).scatter(-1, z.topk(K).indices, relu(z.topk(K).values))


def jump(threshold: Tensor | float) -> Reading:
    return lambda z: relu(z) * (z > threshold)


def formula(w: Weights, act: Reading, *, centre: bool = True, scale: float = 1, norms: Tensor | float = 1) -> dict:
    """Encode and decode: the input times ``scale`` less the decoder's bias if ``centre``; features over ``norms``."""

    def encode(x: Tensor) -> Tensor:
        return act((x * scale - (w["b_dec"] if centre else 0)) @ w["W_enc"] + w.get("b_enc", 0))

    return {"encode": encode, "decode": lambda f: (f / norms @ w["W_dec"] + w["b_dec"]) / scale}


def turned(w: Weights, bias: str = "b_dec", encoder: bool = True) -> Weights:
    """The weights as linear modules store them."""
    stored = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, bias: w["b_dec"]}
    return stored | ({"encoder.bias": w["b_enc"]} if encoder else {})


def write(path: Path, tensors: Weights, config: dict[str, Any] | None = None, name: str = "cfg.json") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save({key: value.contiguous() for key, value in tensors.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    if config is not None:
        (path.parent / name).write_text(json.dumps(config))
    return path.parent


def six(architecture: str, hook: str = "blocks.3.hook_resid_post", *, centre: bool = True, **config: Any) -> dict:
    about = {"sae_lens_version": "6.0.0", "hook_name": hook, "model_name": "tiny"}
    given = {"architecture": architecture, "apply_b_dec_to_input": centre, "metadata": about}
    return {"dtype": "float32", "device": "cpu", "normalize_activations": "none", **given, **config}


def flat(**config: Any) -> dict[str, Any]:
    """A configuration of versions 3 to 5, with entries that are ignored today."""
    hook = {} if "hook_point" in config else {"hook_name": "blocks.3.hook_resid_post"}
    return {
        "model_name": "tiny", "hook_layer": 3, "hook_head_index": None, "dtype": "torch.float32",
        "device": "cuda", "context_size": 128, "prepend_bos": True, "dataset_trust_remote_code": True,
        "activation_fn_str": "relu", "finetuning_scaling_factor": False, "normalize_activations": "none",
        "architecture": "standard", **hook, **config,
    }  # fmt: skip


def sae_lens(root: Path, kind: str) -> Case:
    """SAELens' own layout; its reading on disk is the oracle where it is right."""
    w, factor = weights(), 1 + random(W).abs()
    bare = {name: value for name, value in w.items() if name != "threshold"}
    norms, cut, ones = w["W_dec"].norm(dim=1), jump(w["threshold"]), {"scaling_factor": torch.ones(W)}
    gates = {"b_gate": random(W), "b_mag": random(W), "r_mag": random(W, scale=0.2)}
    ungated = {name: value for name, value in bare.items() if name != "b_enc"}

    def gate(z: Tensor) -> Tensor:
        return relu(z * gates["r_mag"].exp() + gates["b_mag"]) * (z + gates["b_gate"] > 0)

    # configuration, what is stored, the formulas, and what is not as usual
    config, stored, formulas, other = {
        "standard": (six("standard"), bare, formula(w, relu), {}),
        "jumprelu": (
            six("jumprelu", "model.layers.3", centre=False), w, formula(w, cut, centre=False),
            {"place": (3, "resid_post", "output")},
        ),
        "gated": (six("gated"), ungated | gates, formula(ungated, gate), {}),
        "topk": (
            six("topk", k=K, rescale_acts_by_decoder_norm=True), bare,
            formula(w, lambda z: top(z * norms), norms=norms), {},
        ),
        "jumprelu_transcoder": (
            six("jumprelu_transcoder", "blocks.3.mlp.hook_in", centre=False, d_out=D), w, formula(w, cut, centre=False),
            {"place": (3, "mlp_in", None)},
        ),
        "flat jumprelu": (
            flat(architecture="jumprelu", model_from_pretrained_kwargs={"center_writing_weights": False}), w | ones,
            formula(w, cut), {},
        ),
        # fine-tuned factors multiply features before they are decoded; SAELens 6 refuses the file
        "flat standard": (
            flat(apply_b_dec_to_input=False, finetuning_scaling_factor=True),
            bare | {"scaling_factor": factor}, formula(w, relu, centre=False, norms=1 / factor), {"loader": None},
        ),
        # TopK as an activation function, on all heads side by side; SAELens would reshape [tokens, heads, width]
        "flat topk of heads": (
            flat(activation_fn_kwargs={"k": K}, activation_fn_str="topk", hook_point="blocks.3.attn.hook_z"),
            bare | ones, formula(w, top), {"architecture": "topk", "place": (3, "attn_z", None), "loader": None},
        ),
    }[kind]  # fmt: skip
    path = write(root / "layer_3" / "sae_weights.safetensors", stored, {"d_in": D, "d_sae": W, **config})
    known = {"place": (3, "resid_post", None), "architecture": config["architecture"]}
    known["loader"] = lambda: loaders.sae_lens_disk_loader(path, cfg_overrides={"dtype": "float32"})
    return Case(path=path, **formulas, **known | other)


def topk_layer_norm(root: Path) -> Case:
    """A layer norm around the SAE: decoding undoes it with the statistics of the input."""
    w, seen = weights(threshold=False), []
    inner = formula(w, top)

    def encode(x: Tensor) -> Tensor:
        seen.append(x)
        centred = x - x.mean(-1, keepdim=True)
        return inner["encode"](centred / (centred.std(-1, keepdim=True) + 1e-5))

    def decode(f: Tensor) -> Tensor:
        return inner["decode"](f) * seen[-1].std(-1, keepdim=True) + seen[-1].mean(-1, keepdim=True)

    config = six("topk", k=K, normalize_activations="layer_norm")
    path = write(root / "layer_3" / "sae_weights.safetensors", w, {"d_in": D, "d_sae": W, **config})
    return Case(
        path=path, place=(3, "resid_post", None), architecture="topk", encode=encode, decode=decode,
        loader=lambda: loaders.sae_lens_disk_loader(path, cfg_overrides={"dtype": "float32"}),
    )  # fmt: skip


def batchtopk_in_training(root: Path, factor: float | None = None) -> Case:
    """A checkpoint that SAELens' trainer wrote; SAELens' own way to inference is the oracle."""
    metadata = SAEMetadata(hook_name="model.layers.3.mlp", model_name="tiny")
    options = {"d_in": D, "d_sae": W, "k": K, "rescale_acts_by_decoder_norm": True, "metadata": metadata}
    options |= {"normalize_activations": "expected_average_only_in"} if factor else {}
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**options))
    w = weights(threshold=False)
    with torch.no_grad():
        for name, value in w.items():
            getattr(sae, name).copy_(value)
        sae.topk_threshold.fill_(1.5)
    sae.save_model(root / "saved")
    if factor:
        change("cfg.json", None, norm_scaling_factor=factor)(root / "saved")
        sae.fold_activation_norm_scaling_factor(factor)
    sae.save_inference_model(root / "inference")
    scale = factor or 1
    norms, cut = w["W_dec"].norm(dim=1) / scale, jump(1.5 / scale)
    return Case(
        path=root / "saved", place=(3, "mlp_out", "mlp.output"), architecture="batchtopk",
        loader=lambda: loaders.sae_lens_disk_loader(root / "inference"),
        **formula(w, lambda z: cut(z * norms), norms=norms, scale=scale),
    )  # fmt: skip


def sparsify(root: Path, folder: str = "layers.5.mlp", **config: Any) -> Case:
    """SAELens transposes the decoder and takes every module for the residual stream, so it is no oracle."""
    w = weights()
    stored = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    defaults = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": W, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D,
    }  # fmt: skip
    path = write(root / folder / "sae.safetensors", stored, {**defaults, **config})
    (root / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m"}))
    transcode = bool(config.get("transcode"))
    places = {
        ("layers.5.mlp", False): (5, "mlp_out", "mlp.output"),
        ("layers.5.mlp", True): (5, "mlp_in", "mlp.input"),
        ("layers.5", False): (5, "resid_post", "output"),
    }
    architecture = "topk_transcoder" if transcode else "topk"
    formulas = formula(w, lambda z: top(relu(z)), centre=not transcode)
    return Case(path=path, place=places[folder, transcode], architecture=architecture, **formulas)


def gemma_scope_2(root: Path, kind: str = "resid_post_all", *, config: bool = True, skip: bool = False) -> Case:
    w = weights()
    stored = {name.replace("W_", "w_"): value for name, value in w.items()}
    if skip:
        stored["affine_skip_connection"] = random(D, D)
    taps = {
        "resid_post": ("resid_post", "output"),
        "attn_out": ("attn_z", "self_attn.o_proj.input"),
        "mlp_out": ("mlp_out", "post_feedforward_layernorm.output"),
        "transcoder": ("mlp_in", "pre_feedforward_layernorm.output"),
    }
    site, tap = taps[kind.removesuffix("_all")]
    repo, folder = "google/gemma-scope-2-4b-it", f"{kind}/layer_9_width_16k_l0_small"
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-it", "hf_hook_point_in": f"model.layers.9.{tap}"}
    if transcoder := kind.startswith("transcoder"):
        about |= {"hf_hook_point_out": "model.layers.9.post_feedforward_layernorm.output", "affine_connection": skip}
    path = write(root / repo / folder / "params.safetensors", stored, about if config else None, "config.json")
    kinds = {(True, True): "jumprelu_skip_transcoder", (True, False): "jumprelu_transcoder"}
    return Case(
        path=path, place=(9, site, tap), architecture=kinds.get((transcoder, skip), "jumprelu"),
        loader=lambda: loaders.gemma_3_sae_huggingface_loader(repo, folder)[:2],
        **formula(w, jump(w["threshold"]), centre=False),
    )  # fmt: skip


def gemma_scope_1(root: Path, kind: str = "res") -> Case:
    w = weights()
    site, tap = {
        "res": ("resid_post", "output"),
        "att": ("attn_z", "self_attn.o_proj.input"),
        "mlp": ("mlp_out", "post_feedforward_layernorm.output"),
    }[kind]
    repo, folder = f"google/gemma-scope-2b-pt-{kind}", "layer_7/width_16k/average_l0_69"
    path = write(root / repo / folder / "params.npz", w)

    def loader() -> tuple[dict[str, Any], Weights]:
        config, state, _ = loaders.gemma_2_sae_huggingface_loader(repo, folder)
        return {**config, "d_in": D, "d_sae": W}, state  # it knows the real models' sizes only

    formulas = formula(w, jump(w["threshold"]), centre=False)
    return Case(path=path, place=(7, site, tap), architecture="jumprelu", loader=loader, **formulas)


def dictionary(root: Path, kind: str, *, unit: bool = False) -> Case:
    """dictionary_learning; SAELens leaves out decoder norms, so it is right where they are 1."""
    w = weights()
    if unit:
        w["W_dec"] /= w["W_dec"].norm(dim=1, keepdim=True)
    norms = w["W_dec"].norm(dim=1)
    one, k = torch.tensor(0.4), torch.tensor(K, dtype=torch.int)
    r, mag, gate = random(W, scale=0.2), random(W), random(W)
    bare = {name: value for name, value in w.items() if name != "b_enc"}
    cut = {"k": k, "threshold": one}
    cuts = jump(one)
    gates = {"r_mag": r, "gate_bias": gate, "mag_bias": mag}
    # what is stored, the architecture, whether SAELens reads it rightly, the formulas
    stored, architecture, oracle, formulas = {
        "AutoEncoder": (turned(w, "bias"), "standard", True, formula(w, relu)),
        "AutoEncoderNew": (turned(w, "decoder.bias"), "standard", False, formula(w, relu, centre=False)),
        "GatedAutoEncoder": (
            turned(w, "decoder_bias", encoder=False) | gates, "gated", unit,
            formula(bare, lambda z: (z + gate > 0) * relu(r.exp() * z + mag) * norms, norms=norms),
        ),
        "JumpReluAutoEncoder": (
            w, "jumprelu", unit, formula(w, lambda z: jump(w["threshold"])(z) * norms, centre=False, norms=norms),
        ),
        "AutoEncoderTopK": (turned(w) | cut, "topk", True, formula(w, lambda z: top(relu(z)))),
        "BatchTopKSAE": (turned(w) | cut, "batchtopk", True, formula(w, cuts)),
        "MatryoshkaBatchTopKSAE": (
            w | cut | {"group_sizes": torch.tensor([W // 2, W // 2])}, "matryoshka_batchtopk", True, formula(w, cuts),
        ),
    }[kind]  # fmt: skip
    trainer = {
        "trainer_class": "T", "dict_class": kind, "activation_dim": D, "dict_size": W, "k": K, "layer": 4,
        "lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_4",
    }  # fmt: skip
    config = {"trainer": trainer, "buffer": {"d_submodule": D, "io": "out", "ctx_len": 128}}
    folder = "pythia70m/resid_post_layer_4/trainer_0"

    def loader() -> tuple[dict[str, Any], Weights]:
        return loaders.dictionary_learning_sae_huggingface_loader_1("", folder)[:2]

    return Case(
        path=write(root / folder / "ae.pt", stored, config, "config.json"), place=(4, "resid_post", None),
        architecture=architecture, loader=loader if oracle else None, **formulas,
    )  # fmt: skip


def llama_scope(root: Path) -> Case:
    w = weights()
    config = {
        "hook_point_in": "blocks.6.hook_mlp_out", "hook_point_out": "blocks.6.hook_mlp_out", "d_model": D, "d_sae": W,
        "act_fn": "jumprelu", "jump_relu_threshold": 0.3, "dataset_average_activation_norm": {"in": 5.0, "out": 5.0},
    }  # fmt: skip
    folder = "Llama3_1-8B-Base-L6M-8x"
    write(root / folder / "checkpoints" / "final.safetensors", turned(w, "decoder.bias"))
    (root / folder / "hyperparams.json").write_text(json.dumps(config))
    scale = D**0.5 / 5.0

    def loader() -> tuple[dict[str, Any], Weights]:
        config, state, _ = loaders.llama_scope_sae_huggingface_loader("", folder, cfg_overrides={"dtype": "float32"})
        state["W_enc"], state["W_dec"] = state["W_enc"] * scale, state["W_dec"] / scale
        return config, {**state, "b_dec": state["b_dec"] / scale}  # as SAE.from_pretrained folds the factor in

    formulas = formula(w, jump(0.3 * scale), centre=False, scale=scale)
    return Case(
        path=root / folder, place=(6, "mlp_out", None), architecture="jumprelu", loader=loader, **formulas
    )  # fmt: skip


def qwen_scope(root: Path) -> Case:
    w = weights()
    repo, file = f"Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", "layer7.sae.pt"
    stored = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    write(root / repo / file, stored)
    sizes = {"d_in": D, "d_sae": W}
    return Case(
        path=root / repo / file, place=(7, "resid_post", "output"), architecture="topk",
        loader=lambda: loaders.qwen_scope_sae_huggingface_loader(repo, file, cfg_overrides=sizes)[:2],
        **formula(w, top, centre=False),
    )  # fmt: skip


SAE_LENS = (
    "standard", "jumprelu", "gated", "topk", "jumprelu_transcoder", "flat jumprelu", "flat standard",
    "flat topk of heads",
)  # fmt: skip
DICTIONARIES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
)  # fmt: skip
CASES: dict[str, Callable[[Path], Case]] = {
    **{f"sae_lens, {kind}": partial(sae_lens, kind=kind) for kind in SAE_LENS},
    "sae_lens, topk in a layer norm": topk_layer_norm,
    "sae_lens, batchtopk as its trainer saves it": batchtopk_in_training,
    "sae_lens, batchtopk on a scaled input": partial(batchtopk_in_training, factor=0.5),
    "sparsify, topk of an MLP": sparsify,
    "sparsify, topk of a block": partial(sparsify, folder="layers.5", num_latents=0),
    "sparsify, topk transcoder": partial(sparsify, transcode=True),
    "gemma scope 2, resid_post_all": gemma_scope_2,
    "gemma scope 2, resid_post without config": partial(gemma_scope_2, kind="resid_post", config=False),
    "gemma scope 2, attn_out": partial(gemma_scope_2, kind="attn_out"),
    "gemma scope 2, attn_out_all without config": partial(gemma_scope_2, kind="attn_out_all", config=False),
    "gemma scope 2, mlp_out_all": partial(gemma_scope_2, kind="mlp_out_all"),
    "gemma scope 2, transcoder_all without config": partial(gemma_scope_2, kind="transcoder_all", config=False),
    "gemma scope 2, affine transcoder": partial(gemma_scope_2, kind="transcoder", skip=True),
    **{f"gemma scope 1, {kind}": partial(gemma_scope_1, kind=kind) for kind in ("res", "att", "mlp")},
    **{f"dictionary_learning, {kind}": partial(dictionary, kind=kind) for kind in DICTIONARIES},
    "dictionary_learning, GatedAutoEncoder of norm 1": partial(dictionary, kind="GatedAutoEncoder", unit=True),
    "dictionary_learning, JumpReluAutoEncoder of norm 1": partial(dictionary, kind="JumpReluAutoEncoder", unit=True),
    "llama scope, jumprelu": llama_scope,
    "qwen scope, topk": qwen_scope,
}


def differences(case: Case, folder: SAEFolder, root: Path) -> Weights:
    """The largest differences of encode and decode from the formula, and from SAELens' reading where it is right."""
    x = random(64, D, scale=2.0)
    ours, features = load_sae(folder), case.encode(x)
    assert 0 < (features > 0).float().mean() < 1
    found = {"encode": (ours.encode(x) - features).abs().max()}
    found["decode"] = (ours.decode(features) - case.decode(features)).abs().max()
    if case.loader:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaders, "hf_hub_download", lambda *args, **options: local_file(root, *args, **options))
            patch.setattr(loaders, "get_safetensors_tensor_shapes", lambda repo, file: shapes(root / repo / file))
            config, state = case.loader()
        config.pop("model_from_pretrained_kwargs", None)  # only makes it warn
        theirs = SAE.load_from_disk(case.path, converter=lambda *_a, **_o: ({**config, "device": "cpu"}, state))
        theirs.turn_off_forward_pass_hook_z_reshaping()  # heads come side by side here
        with torch.no_grad():
            found["SAELens encode"] = (theirs.encode(x) - ours.encode(x)).abs().max()
            found["SAELens decode"] = (theirs.decode(features) - ours.decode(features)).abs().max()
    return found


def local_file(root: Path, repo_id: str, filename: str, subfolder: str = "", force_download: bool = False) -> str:
    """What SAELens would download."""
    path = root / repo_id / subfolder / filename
    if not path.is_file():
        raise loaders.EntryNotFoundError(f"no {path}")
    return str(path)


def shapes(path: Path) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in load_file(path).items()}


@pytest.mark.parametrize("name", CASES)
def test_a_layout_encodes_and_decodes_as_its_makers_meant(name, tmp_path):
    torch.manual_seed(0)
    case = CASES[name](tmp_path)
    folder = read_folder(case.path)
    assert (folder.layer, folder.site, folder.tap) == case.place
    assert (folder.architecture, folder.d_in, folder.width) == (case.architecture, D, W)
    assert folder.transcoder == ("transcoder" in name)
    sae = load_sae(folder)
    assert (sae.cfg.metadata.hook_name_out is not None) == folder.transcoder
    for some in ([5, 0], []):
        assert torch.equal(load_directions(folder, some)[0], sae.W_dec[some])
    for what, difference in differences(case, folder, tmp_path).items():
        assert difference < 2e-5, f"{what}: {difference}"


def test_a_transcoders_linear_skip_lies_the_right_way(tmp_path):
    case = gemma_scope_2(tmp_path, "transcoder", skip=True)
    skip = load_file(case.path / "params.safetensors")["affine_skip_connection"]
    x = random(9, D)
    whole = case.decode(case.encode(x)) + x @ skip
    assert torch.allclose(load_sae(read_folder(case.path))(x), whole, atol=1e-5)


def test_a_module_that_sae_lens_noted_is_believed_over_its_own_name(tmp_path):
    case = sae_lens(tmp_path, "jumprelu_transcoder")
    names = {"hook_name": "blocks.3.hook_mlp_in", "hf_hook_name": "model.layers.3.pre_feedforward_layernorm.output"}
    change("cfg.json", "metadata", **names)(case.path)
    folder = read_folder(case.path)
    assert (folder.layer, folder.site, folder.tap) == (3, "mlp_in", "pre_feedforward_layernorm.output")


def test_a_release_says_the_factor_that_a_configuration_lacks(tmp_path):
    w = weights(threshold=False)
    config = {**flat(), "d_in": D, "d_sae": W, "normalize_activations": "expected_average_only_in"}
    path = write(tmp_path / "x" / "sae_weights.safetensors", w, config)
    assert "does not say the scale" in refusal(path)
    sae = load_sae(read_folder(path, {"norm_scaling_factor": 2.0}))
    x = random(9, D)
    formulas = formula(w, relu, scale=2)
    features = formulas["encode"](x)
    assert torch.allclose(sae.encode(x), features, atol=1e-5)
    assert torch.allclose(sae.decode(features), formulas["decode"](features), atol=1e-5)
    change("cfg.json", None, normalize_activations="none")(path)
    plain = load_sae(read_folder(path, {"norm_scaling_factor": 2.0}))
    assert torch.allclose(plain.encode(x), formula(w, relu)["encode"](x), atol=1e-5)


def test_half_precision_is_widened_before_it_is_folded(tmp_path):
    case = llama_scope(tmp_path)
    file = case.path / "checkpoints" / "final.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    sae = load_sae(read_folder(case.path))
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, load_file(file)["encoder.weight"].float().T * (D**0.5 / 5.0))
    assert load_sae(read_folder(case.path), torch.bfloat16).W_dec.dtype == torch.bfloat16


def change(file: str, table: str | None, **values: object) -> Callable[[Path], None]:
    """Set values in a table of a folder's configuration, or at its top."""

    def spoil(path: Path) -> None:
        config = json.loads((path / file).read_text())
        (config[table] if table else config).update(values)
        (path / file).write_text(json.dumps(config))

    return spoil


trainer = partial(change, "config.json", "trainer")
auto = partial(dictionary, kind="AutoEncoder")
flat_configurations: list[tuple[dict[str, Any], str]] = [
    ({"activation_fn_str": "tanh-relu"}, "activation function `tanh-relu`"),
    ({"hook_head_index": 3}, "one attention head"),
    ({"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "centred residual stream"),
    ({"normalize_activations": True}, "does not say the scale"),
    ({"normalize_activations": "expected_average_only_in", "norm_scaling_factor": None}, "expected_average_only_in"),
    ({"normalize_activations": "covariance_whitening", "norm_scaling_factor": 2.0}, "covariance_whitening"),
    ({"hook_name": "blocks.3.hook_mlp_in"}, "`blocks.3.hook_mlp_in`"),  # before the norm: no module reads it
]
REFUSED: dict[str, tuple[Callable[[Path], Case], Callable[[Path], object], str]] = {
    "sparsify groupmax": (sparsify, change("cfg.json", None, activation="groupmax"), "activation function `groupmax`"),
    "sparsify signed": (sparsify, change("cfg.json", None, signed=True), "`signed` is not supported"),
    "a cut archive": (gemma_scope_1, lambda path: (path / "params.npz").write_bytes(b"PK\x03\x04"), "is damaged"),
    "no pickles": (
        auto, lambda path: torch.save({"encoder.weight": Path("x")}, path / "ae.pt"), "holds more than tensors",
    ),
    "a lying trainer": (
        auto, trainer(dict_size=7), "`encoder.weight` should have shape (7, 12), the file has (40, 12)",
    ),
    "a class of its own": (auto, trainer(dict_class="CrossCoder"), "the class `CrossCoder` is not supported"),
    "another site": (auto, trainer(submodule_name="embed_layer_4"), "`blocks.4.hook_embed`"),
    "no norm": (
        llama_scope, change("hyperparams.json", "dataset_average_activation_norm", **{"in": None}),
        "`average norm` is `None`",
    ),
    **{
        f"flat, {said}": (partial(sae_lens, kind="flat standard"), change("cfg.json", None, **config), said)
        for config, said in flat_configurations
    },
}  # fmt: skip


def refusal(path: Path) -> str:
    with pytest.raises(SAEError, match="cannot be used") as caught:
        read_folder(path)
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_rightly_is_refused_by_name(name, tmp_path):
    make, spoil, said = REFUSED[name]
    path = make(tmp_path).path
    spoil(path)
    assert said in refusal(path)


def test_gemma_scope_2_is_of_the_model_that_its_release_names(tmp_path):
    assert read_folder(gemma_scope_2(tmp_path).path).model_name == "google/gemma-3-4b-it"


def test_gemma_scope_must_say_where_it_reads(tmp_path):
    two = gemma_scope_2(tmp_path, config=False).path
    moved = two.parent.rename(two.parents[1] / "mine") / two.name
    assert "`mine/layer_9_width_16k_l0_small` does not say what it reads" in refusal(moved)
    one = "layer_7/width_16k/average_l0_69"
    for name, said in (
        ("renamed", "its path does not say what it reads"),
        ("gemma-scope-2b-pt-transcoders", "`gemma-scope-2b-pt-transcoders` is not supported"),
    ):
        repository = gemma_scope_1(tmp_path).path.parents[2].rename(tmp_path / name)
        assert said in refusal(repository / one)

"""How published SAEs are stored: a reader for each layout, which says what an SAE reads without opening its weights.

read_folder(Path("resid_post_all/layer_12_width_16k_l0_small"))     # SAEFolder(layer=12, site="resid_post", ...)

A reader believes nothing: it returns a claim, which `read_folder` checks. Converters of weights are in formats.py.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stethoscope.errors import SAEError
from stethoscope.saes.folder import ARCHITECTURES, SAEFolder, Shapes, read_json, read_shapes, site_of, unusable

# Tensors that hold a value per feature, by architecture, in SAELens' names.
PER_FEATURE = {"gated": ("b_gate", "b_mag", "r_mag"), "jumprelu": ("b_enc", "threshold")}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What a folder says of its SAE, not yet believed; ``wanted`` are the shapes that its sizes ask for."""

    hook_name: str
    architecture: str
    d_in: Any
    width: Any
    model_name: Any
    wanted: Mapping[str, tuple[Any, ...]]
    shapes: Shapes
    problems: list[str]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of storing SAEs.

    Attributes:
        marker: the file that tells it from others; where one file is a whole SAE, how its name ends.
        files: those that hold configuration and weights; a missing configuration may be none.
        read: folder and overrides of its configuration -> claim; problems go into the list.
    """

    marker: str
    files: tuple[str, ...]
    read: Callable[[Path, Mapping[str, Any], list[str]], Claim]


def layout_of(path: Path) -> str | None:
    """The layout of a folder by the files in it, or of a file that is an SAE itself; None if there is no SAE."""
    if path.name.endswith(LAYOUTS["qwen_scope"].marker) and path.is_file():
        return "qwen_scope"
    return next((name for name, layout in LAYOUTS.items() if (path / layout.marker).is_file()), None)


def read_folder(path: Path, overrides: Mapping[str, Any] | None = None) -> SAEFolder:
    """What the SAE of a folder is and reads.

    Args:
        path: a folder with the files of one layout, or the one file of an SAE that needs no more.
        overrides: entries that replace the configuration's own.

    Raises:
        SAEError: it is not readable, sound and supported; everything that is wrong with it is in ``problems``.
    """
    name = layout_of(path)
    if name is None:
        markers = ", ".join(f"`{layout.marker}`" for layout in LAYOUTS.values())
        raise unusable([f"it holds none of {markers}" if path.is_dir() else "there is no such folder"])
    layout, problems = LAYOUTS[name], list[str]()
    claim = layout.read(path, overrides or {}, problems)
    for size, value in (("d_in", claim.d_in), ("d_sae", claim.width)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"`{size}` is `{value}`, not a positive whole number")
    if claim.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        problems.append(f"the architecture `{claim.architecture}` is not supported; these are: {known}")
    layer, site, tap = -1, "", None
    try:
        layer, site, tap = site_of(claim.hook_name)
    except SAEError as error:
        problems += error.problems if claim.hook_name else ["it does not say which layer it reads"]
    if claim.shapes:
        problems += [
            f"`{tensor}` should have shape {shape}, the file has {claim.shapes.get(tensor, 'none')}"
            for tensor, shape in claim.wanted.items()
            if claim.shapes.get(tensor) != shape
        ]
    if problems:
        raise unusable(problems)
    return SAEFolder(
        path=path,
        layout=name,
        files=tuple(file for file in layout.files if (path / file).is_file()),
        layer=layer,
        site=site,
        tap=tap,
        width=claim.width,
        d_in=claim.d_in,
        architecture=claim.architecture,
        hook_name=claim.hook_name,
        model_name=str(claim.model_name) if claim.model_name else None,
        overrides=dict(overrides or {}),
    )


def _table(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shapes(path: Path, problems: list[str]) -> Shapes:
    try:
        return read_shapes(path)
    except SAEError as error:
        problems += error.problems
        return {}


def _sizes(shapes: Shapes, name: str, path: Path, problems: list[str]) -> tuple[int, int]:
    """The two sizes of a matrix, for layouts whose configuration does not give them."""
    shape = shapes.get(name, ())
    if shapes and len(shape) != 2:
        problems.append(f"`{path.name}` has no matrix `{name}`")
    # the reason why there are none was given, so these only need to pass as sizes
    return (shape[0], shape[1]) if len(shape) == 2 else (1, 1)


def _sae_lens(path: Path, overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """SAELens 6, with metadata in a table of its own, and the flat configurations of 3 to 5."""
    config = {**read_json(path / "cfg.json"), **overrides}
    about = {**config, **_table(config.get("metadata"))}
    activation = str(config.get("activation_fn_str") or config.get("activation_fn") or "relu")
    if activation not in ("relu", "topk"):
        problems.append(f"the activation function `{activation}` is not supported; these are: relu, topk")
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and activation == "topk":
        architecture = "topk"
    normalized = config.get("normalize_activations")
    if (
        normalized is True or normalized in ("expected_average_only_in", "covariance_whitening")
    ) and "norm_scaling_factor" not in overrides:
        problems.append(f"it reads scaled activations but does not say the scale (normalize_activations: {normalized})")
    if about.get("hook_head_index", about.get("hook_point_head_index")) is not None:
        problems.append("it reads one attention head, which is not supported")
    if _table(about.get("model_from_pretrained_kwargs")).get("center_writing_weights"):
        problems.append("it reads TransformerLens' centred residual stream (center_writing_weights), not the model's")
    hook = str(about.get("hf_hook_name") or about.get("hook_name") or about.get("hook_point") or "")
    d_in, width = config.get("d_in"), config.get("d_sae")
    d_out = config.get("d_out") if architecture.endswith("transcoder") else d_in
    per_feature = PER_FEATURE.get(architecture.split("_", 1)[0], ("b_enc",))
    return Claim(
        hook_name=hook.replace("{layer}", str(about.get("hook_point_layer"))),
        architecture=architecture,
        d_in=d_in,
        width=width,
        model_name=about.get("model_name"),
        wanted={
            "W_enc": (d_in, width),
            "W_dec": (width, d_out),
            "b_dec": (d_out,),
            **dict.fromkeys(per_feature, (width,)),
        },
        shapes=_shapes(path / "sae_weights.safetensors", problems),
        problems=problems,
    )


def _sparsify(path: Path, _overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """EleutherAI's sparsify; the folder is called like the module that it reads."""
    config = read_json(path / "cfg.json")
    if (activation := config.get("activation", "topk")) != "topk":
        problems.append(f"the activation function `{activation}` is not supported; this is: topk")
    problems += [f"`{name}` is not supported" for name in ("signed", "embed_skip", "gram_lookup") if config.get(name)]
    if not isinstance(k := config.get("k"), int) or k < 1:
        problems.append(f"`k` is `{k}`, not a positive whole number")
    shapes = _shapes(path / "sae.safetensors", problems)
    width, d_in = _sizes(shapes, "encoder.weight", path / "sae.safetensors", problems)
    transcode, module = bool(config.get("transcode")), path.absolute().name
    run = path.absolute().parent / "config.json"
    return Claim(
        hook_name=f"{module}.input" if transcode else module,
        architecture="topk_transcoder" if transcode else "topk",
        d_in=config.get("d_in"),
        width=width,
        model_name=read_json(run).get("model") if run.is_file() else None,
        wanted={
            "encoder.weight": (width, config.get("d_in")),
            "encoder.bias": (width,),
            "W_dec": (width, d_in),
            "b_dec": (d_in,),
        },
        shapes=shapes,
        problems=problems,
    )


_GEMMA_TAPS = {
    "resid_post": "output",
    "attn_out": "self_attn.o_proj.input",
    "mlp_out": "post_feedforward_layernorm.output",
    "transcoder": "pre_feedforward_layernorm.output",
}


def _gemma_scope_2(path: Path, _overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """Gemma Scope 2; without its configuration, the folder above says where it reads."""
    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    name, above = path.absolute().name, path.absolute().parent.name
    tap, layer = _GEMMA_TAPS.get(above.removesuffix("_all")), re.match(r"layer_(\d+)", name)
    hook = str(config.get("hf_hook_point_in") or (f"layers.{layer[1]}.{tap}" if tap and layer else ""))
    if not hook:
        problems.append(
            f"it has no `config.json`, and `{above}/{name}` does not say what it reads, as"
            " `resid_post_all/layer_12_width_16k_l0_small` would"
        )
    if (architecture := config.get("architecture", "jump_relu")) != "jump_relu":
        problems.append(f"the architecture `{architecture}` is not supported in Gemma Scope 2's layout")
    shapes = _shapes(path / "params.safetensors", problems)
    d_in, width = _sizes(shapes, "w_enc", path / "params.safetensors", problems)
    transcoder = above.startswith("transcoder") or bool(config.get("hf_hook_point_out"))
    skip = "affine_skip_connection" in shapes
    release = re.search(r"gemma-scope-2-(\w+-(?:it|pt))", path.absolute().as_posix())
    return Claim(
        hook_name=hook,
        architecture=("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder") if transcoder else "jumprelu",
        d_in=d_in,
        width=width,
        model_name=config.get("model_name") or (release and f"google/gemma-3-{release[1]}"),
        # a transcoder's output is as wide as its input in every Gemma
        wanted={"w_dec": (width, d_in), "b_enc": (width,), "b_dec": (d_in,), "threshold": (width,)},
        shapes=shapes,
        problems=problems,
    )


def _gemma_scope(path: Path, _overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """Gemma Scope 1, which has no configuration: the repository's name and the folders say it all."""
    taps = {"res": _GEMMA_TAPS["resid_post"], "att": _GEMMA_TAPS["attn_out"], "mlp": _GEMMA_TAPS["mlp_out"]}
    where = f"{path.absolute().as_posix()}/"
    release, layer = re.search(r"gemma-scope-(\d+b)-(pt|it)-([a-z]+)", where), re.search(r"/layer_(\d+)/", where)
    if release is None or layer is None:
        problems.append(
            "its path does not say what it reads, as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82` would"
        )
    elif release[3] not in taps:
        problems.append(f"`{release[0]}` is not supported; these kinds of Gemma Scope 1 are: {', '.join(taps)}")
    shapes = _shapes(path / "params.npz", problems)
    d_in, width = _sizes(shapes, "W_enc", path / "params.npz", problems)
    return Claim(
        hook_name=f"layers.{layer[1]}.{taps.get(release[3], 'output')}" if release and layer else "",
        architecture="jumprelu",
        d_in=d_in,
        width=width,
        model_name=release and f"google/gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}",
        wanted={"W_dec": (width, d_in), "b_enc": (width,), "b_dec": (d_in,), "threshold": (width,)},
        shapes=shapes,
        problems=problems,
    )


DICTIONARIES = {
    "AutoEncoder": "standard", "AutoEncoderNew": "standard", "GatedAutoEncoder": "gated",
    "JumpReluAutoEncoder": "jumprelu", "AutoEncoderTopK": "topk", "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka_batchtopk",
}  # fmt: skip


def _dictionary_learning(path: Path, _overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """dictionary_learning by Marks and others; its configuration is its trainer's."""
    config = read_json(path / "config.json")
    trainer, buffer = _table(config.get("trainer")), _table(config.get("buffer"))
    kind = str(trainer.get("dict_class"))
    if kind not in DICTIONARIES:
        problems.append(f"the class `{kind}` is not supported; these are: {', '.join(DICTIONARIES)}")
    if (io := buffer.get("io", "out")) != "out":
        problems.append(f"it was made from its module's `{io}`; only `out` is supported")
    site = re.sub(r"_layer_\d+$", "", str(trainer.get("submodule_name") or "resid_post"))
    shapes = _shapes(path / "ae.pt", problems)
    d_in, width = trainer.get("activation_dim"), trainer.get("dict_size")
    straight = {"W_enc": (d_in, width), "W_dec": (width, d_in)}
    turned = {"encoder.weight": (width, d_in), "decoder.weight": (d_in, width)}
    return Claim(
        hook_name=f"blocks.{trainer['layer']}.hook_{site}" if "layer" in trainer else "",
        architecture=DICTIONARIES.get(kind, "standard"),
        d_in=d_in,
        width=width,
        model_name=trainer.get("lm_name"),
        wanted=straight if "W_enc" in shapes else turned,
        shapes=shapes,
        problems=problems,
    )


def _llama_scope(path: Path, _overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """Llama Scope by fnlp."""
    config = read_json(path / "hyperparams.json")
    if (activation := config.get("act_fn", "jumprelu")) != "jumprelu":
        problems.append(f"the activation function `{activation}` is not supported; this is: jumprelu")
    hook = config.get("hook_point_in")
    if config.get("hook_point_out", hook) != hook:
        problems.append("it is a transcoder, which is not supported in Llama Scope's layout")
    norm = _table(config.get("dataset_average_activation_norm")).get("in")
    for name, value in (("jump_relu_threshold", config.get("jump_relu_threshold")), ("average norm", norm)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            problems.append(f"`{name}` is `{value}`, not a number")
    d_in, width = config.get("d_model"), config.get("d_sae")
    return Claim(
        hook_name=str(hook or ""),
        architecture="jumprelu",
        d_in=d_in,
        width=width,
        model_name="meta-llama/Llama-3.1-8B",
        wanted={
            "encoder.weight": (width, d_in),
            "encoder.bias": (width,),
            "decoder.weight": (d_in, width),
            "decoder.bias": (d_in,),
        },
        shapes=_shapes(path / "checkpoints" / "final.safetensors", problems),
        problems=problems,
    )


def _qwen_scope(path: Path, _overrides: Mapping[str, Any], problems: list[str]) -> Claim:
    """Qwen-Scope: a file per layer, without configuration; the repository's name says the rest."""
    release = re.search(r"SAE-Res-([^/]+)-W\d+K-L0_\d+", path.absolute().as_posix())
    layer = re.fullmatch(r"layer(\d+)\.sae\.pt", path.name)
    if release is None or layer is None:
        problems.append(
            "its path does not say what it reads, as `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer12.sae.pt` would"
        )
    shapes = _shapes(path, problems)
    width, d_in = _sizes(shapes, "W_enc", path, problems)
    return Claim(
        hook_name=f"model.layers.{layer[1]}" if release and layer else "",
        architecture="topk",
        d_in=d_in,
        width=width,
        model_name=release and f"Qwen/{release[1]}",
        wanted={"W_dec": (d_in, width), "b_enc": (width,), "b_dec": (d_in,)},
        shapes=shapes,
        problems=problems,
    )


# In the order of looking: sparsify's folders hold a `cfg.json` too.
LAYOUTS = {
    "sparsify": Layout(read=_sparsify, marker="sae.safetensors", files=("cfg.json", "sae.safetensors")),
    "gemma_scope_2": Layout(
        read=_gemma_scope_2, marker="params.safetensors", files=("config.json", "params.safetensors")
    ),
    "gemma_scope": Layout(read=_gemma_scope, marker="params.npz", files=("params.npz",)),
    "dictionary_learning": Layout(read=_dictionary_learning, marker="ae.pt", files=("config.json", "ae.pt")),
    "llama_scope": Layout(
        read=_llama_scope, marker="hyperparams.json", files=("hyperparams.json", "checkpoints/final.safetensors")
    ),
    "qwen_scope": Layout(read=_qwen_scope, marker=".sae.pt", files=("",)),  # the path itself
    "sae_lens": Layout(read=_sae_lens, marker="cfg.json", files=("cfg.json", "sae_weights.safetensors")),
}

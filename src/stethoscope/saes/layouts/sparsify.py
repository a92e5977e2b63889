"""EleutherAI's sparsify; the folder is called like the module that it reads."""

from typing import Any

from stethoscope.saes.layouts.base import Claim, Converted, Layout, SAEFolder, Stored, sae_lens_config
from stethoscope.saes.layouts.files import State, read_json, renamed


def read(stored: Stored) -> Claim:
    config = stored.config
    if (activation := config.get("activation", "topk")) != "topk":
        stored.problems.append(f"the activation function `{activation}` is not supported; this is: topk")
    unsupported = [name for name in ("signed", "embed_skip", "gram_lookup") if config.get(name)]
    stored.problems.extend(f"`{name}` is not supported" for name in unsupported)
    if not isinstance(k := config.get("k"), int) or k < 1:
        stored.problems.append(f"`k` is `{k}`, not a positive whole number")
    width, columns = stored.matrix("encoder.weight")
    d_in, transcode, module = config.get("d_in"), bool(config.get("transcode")), stored.path.name
    run = stored.path.parent / "config.json"
    model_name = read_json(run).get("model") if run.is_file() else None
    hook_name, architecture = (f"{module}.input", "topk_transcoder") if transcode else (module, "topk")
    wanted = {"encoder.weight": (width, d_in), "encoder.bias": (width,), "W_dec": (width, columns), "b_dec": (columns,)}
    return Claim(hook_name, architecture, d_in, width, model_name, wanted)


def convert(folder: SAEFolder, config: dict[str, Any], tensors: State) -> Converted:
    """The k largest of relu((x - b_dec) W_enc + b_enc); a transcoder subtracts no bias."""
    names = {"W_dec": "W_dec", "b_enc": "encoder.bias", "b_dec": "b_dec"}
    state = renamed(tensors, names, turned={"W_enc": "encoder.weight"})
    return sae_lens_config(folder, "topk", b_dec_to_input=not folder.transcoder, k=config["k"]), state


LAYOUT = Layout(marker="sae.safetensors", config="cfg.json", weights="sae.safetensors", read=read, convert=convert)

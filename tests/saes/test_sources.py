"""What `open_saes` finds, what it refuses, and that every problem is said at once."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import save_file
from world import make, random_sae

from stethoscope import errors
from stethoscope.checkpoints.checkpoint import Checkpoint
from stethoscope.checkpoints.header import make_entry
from stethoscope.errors import SAEError, StethoscopeError
from stethoscope.models.sites import SITES, TAPS, hook_point, read_activations, site_of
from stethoscope.saes.open import check_fit, load_sae, open_saes
from stethoscope.saes.releases import release_texts


def write_sae(folder: Path, hook_name: str, *, d_in: int = 8) -> Path:
    """A real SAELens SAE on disk."""
    metadata = SAEMetadata(hook_name=hook_name, model_name="tiny/llama")
    random_sae(d=d_in, width=16, metadata=metadata).save_model(folder)
    return folder


def base_of(hidden: int = 8, *, layers: int = 11, source: str = "tiny/llama", heads: int | None = None) -> Checkpoint:
    """A checkpoint that is not read, with as much as SAEs must fit."""
    o_proj = make_entry("model.layers.0.self_attn.o_proj.weight", "x", "F32", (hidden, heads or 0), 0, 0)
    entries = {o_proj.name: o_proj} if heads else {}
    base = Checkpoint(Path("x"), {"hidden_size": hidden}, entries, source=source)
    base.layers = layers
    return base


@pytest.fixture
def saes(tmp_path):
    for layer in (10, 2, 0):
        write_sae(tmp_path / "saes" / f"layer_{layer}", f"model.layers.{layer}")
    return tmp_path / "saes"


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({**config, **changes}))


def refusal(source, sae_id=None) -> str:
    with pytest.raises(SAEError) as caught:
        open_saes(source, sae_id)
    return str(caught.value)


@pytest.mark.parametrize(
    ("hook_name", "expected"),
    [
        ("blocks.12.hook_resid_post", (12, "resid_post", None)),
        ("blocks.1.hook_resid_pre", (1, "resid_pre", None)),
        ("blocks.3.hook_mlp_out", (3, "mlp_out", None)),
        ("blocks.0.hook_attn_out", (0, "attn_out", None)),
        ("blocks.7.attn.hook_z", (7, "attn_z", None)),
        ("model.layers.12", (12, "resid_post", "output")),
        ("model.layers.12.output", (12, "resid_post", "output")),
        ("model.language_model.layers.7.mlp", (7, "mlp_out", "mlp.output")),
        ("model.layers.4.self_attn", (4, "attn_out", "self_attn.output")),
        ("transformer.h.5", (5, "resid_post", "output")),
        *((f"model.layers.2.{tap}", (2, site, tap)) for site, taps in TAPS.items() for tap in taps),
    ],
)
def test_hook_names_of_both_styles_are_understood(hook_name, expected):
    assert site_of(hook_name) == expected
    assert set(SITES) == set(TAPS)


# the last one ends attention in Gemma and begins the MLP in Llama
UNKNOWN = "blocks.1.hook_resid_mid", "lm_head", "layers.x", "h.1.foo", "model.layers.1.post_attention_layernorm"


@pytest.mark.parametrize("hook_name", UNKNOWN)
def test_an_unknown_site_is_refused_by_name(hook_name):
    with pytest.raises(SAEError, match=f"`{hook_name}`"):
        site_of(hook_name)


def test_a_folder_gives_its_saes_in_order_of_depth(saes, caplog):
    found = open_saes(saes)
    assert list(found) == [0, 2, 10]
    assert (found[2].site, found[2].width, found[2].d_in, found[2].architecture) == ("resid_post", 16, 8, "standard")
    check_fit(found, base_of())
    assert not caplog.text
    check_fit(found, base_of(source="Other"))  # logged, not refused
    assert "tiny/llama" in caplog.text
    ours, theirs, x = load_sae(found[2]), SAE.load_from_disk(saes / "layer_2"), torch.randn(5, 8)
    assert torch.equal(ours.encode(x), theirs.encode(x))
    assert ours.W_dec.dtype == torch.float32
    assert not ours.W_enc.requires_grad
    before = found[2].hashed()
    assert before == open_saes(saes)[2].hashed()
    edit_config(saes / "layer_2", note="changed")
    assert before != open_saes(saes)[2].hashed()


def test_a_pattern_picks_some(saes):
    write_sae(saes / "other", "model.layers.2")
    assert open_saes(saes, sae_id="layer_{layer}").keys() == {0, 2, 10}
    assert open_saes(saes / "other").keys() == {2}
    write_sae(saes / "layer_3", "model.layers.4")
    assert "layer 3: the SAE reads layer 4" in refusal(saes, sae_id="layer_{layer}")
    for sae_id in ("layer_3", "../{layer}", "/{layer}", "layer_**{layer}"):
        assert "no pattern" in refusal(saes, sae_id)


def test_every_problem_of_reading_is_said_at_once(saes):
    write_sae(saes / "a_twin", "model.layers.10")
    edit_config(write_sae(saes / "b_temporal", "model.layers.1"), architecture="temporal")
    edit_config(write_sae(saes / "c_lying", "model.layers.3"), d_sae=99)
    (write_sae(saes / "d_hollow", "model.layers.4") / "sae_weights.safetensors").unlink()
    (write_sae(saes / "e_torn", "model.layers.5") / "cfg.json").write_text("{")
    write_sae(saes / "f_elsewhere", "blocks.6.hook_resid_mid")
    weights = write_sae(saes / "g_cut", "model.layers.7") / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    edit_config(write_sae(saes / "h_typo", "model.layers.8"), d_in="eight")
    text = refusal(saes)
    for said in (
        "layer 10: one SAE is wanted, there are",
        "`temporal` is not supported",
        "`W_enc` should have shape (8, 99), the file has (8, 16)",
        "d_hollow",
        "cfg.json` is not valid JSON",
        "`blocks.6.hook_resid_mid`",
        "g_cut",
        "`d_in` is `eight`",
        "hint: ",
    ):
        assert said in text


def test_every_misfit_is_said_at_once(saes):
    shutil.rmtree(saes / "layer_2")
    write_sae(saes / "layer_2", "model.layers.2", d_in=12)
    write_sae(saes / "mlp", "blocks.1.hook_mlp_out")
    with pytest.raises(SAEError, match="do not fit the base model") as caught:
        check_fit(open_saes(saes), base_of(layers=10))
    assert [problem.split(", from")[0] for problem in caught.value.problems] == [
        "layer 2: the SAE reads 12 values, the model's hidden size is 8",
        "layer 10: the model has 10 layers, 0 to 9 (`model.layers.10`)",
        "the SAEs read `mlp_out`, `resid_post`: layers would not be comparable",
    ]
    assert "tiny/llama" in (caught.value.hint or "")


def test_two_taps_of_one_site_are_not_comparable(saes, tmp_path):
    for layer, module in enumerate(("mlp", "post_feedforward_layernorm", "mlp")):
        write_sae(tmp_path / "taps" / f"layer_{layer}", f"model.layers.{layer}.{module}")
    with pytest.raises(SAEError, match=r"`mlp.output`, `post_feedforward_layernorm.output`"):
        check_fit(open_saes(tmp_path / "taps"), base_of())
    write_sae(saes / "other", "blocks.3.hook_resid_post")  # the same place by another name
    check_fit(open_saes(saes), base_of())


def test_without_sae_lens_a_name_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(errors, "find_spec", lambda _name: None)
    release_texts.cache_clear()
    with pytest.raises(StethoscopeError, match="not installed: sae_lens"):
        open_saes(GEMMA, local=True)


def test_nothing_found_says_what_is_there(saes, tmp_path):
    assert "layer_10" in refusal(saes, "resid_{layer}")
    write_gemma_scope_2(tmp_path / "gemma" / "resid_post_all" / "layer_5_width_16k_l0_big")
    layouts = {layer: sae.layout for layer, sae in open_saes(tmp_path).items()}
    assert layouts == {layer: "gemma_scope_2" if layer == 5 else "sae_lens" for layer in (0, 2, 5, 10)}
    (tmp_path / "empty").mkdir()
    assert "no SAEs in" in refusal(tmp_path / "empty")
    assert "there is no folder" in refusal(tmp_path / "absent")


def test_the_sites_width_is_what_must_fit(tmp_path):
    """Attention's heads side by side are not as wide as the residual stream in Gemma 3."""
    model = make("gemma3 text", dtype=torch.float32)
    heads = model.config.num_attention_heads * model.config.head_dim
    hidden = model.config.hidden_size
    write_sae(tmp_path / "z" / "layer_0", "model.layers.0.self_attn.o_proj.input", d_in=heads)
    saes = open_saes(tmp_path / "z")
    check_fit(saes, base_of(hidden, heads=heads))
    check_fit(saes, base_of(hidden))
    with pytest.raises(SAEError, match=f"reads {heads} values, the model's width of all heads is 99"):
        check_fit(saes, base_of(hidden, heads=99))
    write_sae(tmp_path / "m", "model.layers.0.mlp", d_in=17)
    with pytest.raises(SAEError, match="the model's hidden size is"):
        check_fit(open_saes(tmp_path / "m"), base_of(hidden, heads=heads))
    sae = saes[0]
    activations = read_activations(
        model, {0: hook_point(model, sae.layer, sae.site, sae.tap)}, torch.tensor([[5, 9, 12]])
    )[0]
    assert load_sae(sae).encode(activations).shape == (1, 3, sae.width)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub library's cache, as a download leaves it; the folder of a repository's newest snapshot in it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    def repository(name: str) -> Path:
        root = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text("0" * 40)
        (root / "snapshots" / ("0" * 40)).mkdir(parents=True)
        return root / "snapshots" / ("0" * 40)

    return repository


def write_gemma_scope_2(folder: Path, *, d_in: int = 6, width: int = 10) -> None:
    folder.mkdir(parents=True)
    shapes = {"w_enc": (d_in, width), "w_dec": (width, d_in), "b_enc": (width,), "b_dec": (d_in,)}
    tensors = {name: torch.randn(shape) for name, shape in {**shapes, "threshold": (width,)}.items()}
    save_file(tensors, folder / "params.safetensors")


def test_a_release_is_found_by_name_and_taken_from_the_cache(hub):
    repository = hub("google/gemma-scope-2-4b-it")
    for layer in range(34):
        for size in ("small", "big"):
            write_gemma_scope_2(repository / f"attn_out_all/layer_{layer}_width_16k_l0_{size}")
    saes = open_saes("gemma-scope-2-4b-it-att-all", "layer_{layer}_width_16k_l0_small")
    assert [sae.path.name for sae in saes.values()] == [f"layer_{layer}_width_16k_l0_small" for layer in range(34)]
    assert (saes[9].site, saes[9].tap, saes[9].layout) == ("attn_z", "self_attn.o_proj.input", "gemma_scope_2")
    assert saes[9].model_name == "google/gemma-3-4b-it"
    # the same by the repository's name
    assert open_saes("google/gemma-scope-2-4b-it", "attn_out_all/layer_{layer}_width_16k_l0_small") == saes
    with pytest.raises(SAEError) as caught:
        open_saes("google/gemma-scope-2-4b-it", "attn_out_all/layer_{layer}_width_16k_l0_*")
    assert len(caught.value.problems) == 34
    both = [f"layer_3_width_16k_l0_{size}" for size in ("big", "small")]
    assert all(name in caught.value.problems[3] for name in ["layer 3: one SAE is wanted", *both])
    for layer in (9, 17, 22, 29):
        write_gemma_scope_2(repository / f"resid_post/layer_{layer}_width_16k_l0_medium")
    saes = open_saes("gemma-scope-2-4b-it-res", "layer_{layer}_width_16k_l0_medium")
    assert saes[17].overrides["neuronpedia_id"] == "gemma-3-4b-it/17-gemmascope-2-res-16k"  # its features' public pages
    assert load_sae(saes[17]).cfg.d_sae == 10


@pytest.mark.parametrize(
    ("source", "sae_id"),
    [
        ("gemma-scope-2-1b-it-res-all", "layer_{layer}_width_16k_l0_small"),
        ("google/gemma-scope-2-1b-it", "resid_post_all/layer_{layer}_width_16k_l0_small"),
    ],
)
def test_only_what_is_wanted_is_fetched(source, sae_id, tmp_path, monkeypatch):
    """The hub library's own filter between a folder that stands for the hub and one for its cache."""
    remote, local = tmp_path / "remote", tmp_path / "gemma-scope-2-1b-it"
    for layer in range(26):
        for kind in ("resid_post_all", "mlp_out_all"):
            for size in ("16k_l0_small", "16k_l0_big", "262k_l0_small"):
                write_gemma_scope_2(remote / kind / f"layer_{layer}_width_{size}")

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        assert repository == "google/gemma-scope-2-1b-it"
        names = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(names, allow_patterns=allow_patterns):
            (local / name).parent.mkdir(parents=True)
            shutil.copy(remote / name, local / name)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert list(open_saes(source, sae_id)) == list(range(26))
    assert {path.parent.name for path in local.rglob("*.*")} == {f"layer_{n}_width_16k_l0_small" for n in range(26)}
    assert len(list(local.rglob("*.*"))) == 26


def test_a_release_corrects_what_a_configuration_says(hub):
    repository = hub("JoshEngels/Mistral-7B-Residual-Stream-SAEs")
    for layer in (8, 16, 24):
        write_sae(repository / f"mistral_7b_layer_{layer}", f"blocks.{layer}.hook_resid_pre")
    saes = open_saes("mistral-7b-res-wg")
    assert saes[8].overrides == {"normalize_activations": "constant_norm_rescale"}
    assert saes[8].hashed() != open_saes(saes[8].path)[8].hashed()
    x = torch.randn(5, 8)
    ours, theirs = load_sae(saes[8]), SAE.load_from_disk(saes[8].path)
    factor = 8**0.5 / x.norm(dim=-1, keepdim=True)
    features = theirs.encode(x * factor)
    assert torch.allclose(ours.encode(x), features, atol=1e-6)
    assert torch.allclose(ours.decode(ours.encode(x)), theirs.decode(features) / factor, atol=1e-5)


def test_saes_in_a_file_each_are_found_by_release_repository_and_folder(hub):
    repository = hub("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50")
    for layer in range(28):
        shapes = {"W_enc": (64, 6), "W_dec": (6, 64), "b_enc": (64,), "b_dec": (6,)}
        torch.save({name: torch.randn(shape) for name, shape in shapes.items()}, repository / f"layer{layer}.sae.pt")
    saes = open_saes("qwen-scope-3-1.7b-base-w32k-l50", "layer{layer}")
    assert list(saes) == list(range(28))
    assert (saes[3].site, saes[3].model_name, saes[3].layout) == ("resid_post", "Qwen/Qwen3-1.7B-Base", "qwen_scope")
    assert len({sae.hashed() for sae in saes.values()}) == 28
    assert open_saes("Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer{layer}.sae.pt") == saes
    assert open_saes(repository) == saes
    renamed = shutil.copytree(repository, repository.parents[3] / "renamed")
    assert "does not say what it reads" in refusal(renamed)


GEMMA = "gemma-scope-2-4b-it-res-all"


@pytest.mark.parametrize(
    ("source", "sae_id", "said"),
    [
        ("gemma-scope-2-4b-it-res-al", None, f"did you mean `{GEMMA}`"),
        (GEMMA, None, "choose with `sae_id`: `layer_{layer}_width_16k_l0_big`"),
        (GEMMA, "layer_{layer}_width_16k_smal", "there are: `layer_{layer}_width_16k_l0_small`"),
        (GEMMA, "layer_12_width_16k_l0_small", "no pattern"),
        (GEMMA, "layer_{layer}_width_16k_*", "picks several SAEs for a layer"),
        ("llama_scope_r1_distill", None, "stored as `llama_scope_r1_distill`, which is not supported"),
        ("someone/saes", None, "which SAEs of the hub repository `someone/saes`"),
        ("someone/saes", "layer_{layer}", "nor in the hub's cache, and the hub cannot be reached"),
        ("gpt2-small-mlp-out-v5-32k", None, "nor in the hub's cache"),
        ("not/a/place", None, "there is no folder `not/a/place`"),
    ],
)
@pytest.mark.usefixtures("hub")
def test_a_name_that_leads_nowhere_says_what_does(source, sae_id, said):
    assert said in refusal(source, sae_id)


def test_a_link_out_of_an_saes_folder_is_not_followed(saes, tmp_path):
    weights = saes / "layer_2" / "sae_weights.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    assert "link out" in refusal(saes)

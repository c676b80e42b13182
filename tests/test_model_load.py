"""Loading checkpoints: what is good loads bit for bit, what is broken is refused in one sentence."""

import json
import re
import shutil
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.bert import BertConfig, BertForMaskedLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.t5 import T5Config, T5ForConditionalGeneration
from transformers.tokenization_utils_tokenizers import TokenizersBackend
from transformers.utils import logging as hf_logging

from instruct_ft.model import load
from instruct_ft.model.load import (
    find_checkpoint,
    load_model,
    model_card,
    pick_device,
    pick_dtype,
    quiet,
    read_header,
)
from instruct_ft.settings import InputError

SIZE = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
V = 280
UP = "model.layers.1.mlp.up_proj.weight"
IDS = torch.arange(24).reshape(2, 12) * 11 % V


def make_tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=V,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["The capital of Peru is Lima, of Chile Santiago."] * 3, trainer)
    return TokenizersBackend(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )


def make_model(kind="llama", tied=False):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, tie_word_embeddings=tied
        )
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        vocab_size=V, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=2, **SIZE
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "good"
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "broken"))


def refusal(*args, **kwargs):
    "The sentence `load_model` refuses with"
    with pytest.raises(InputError) as caught:
        load_model(*args, **({"device": "cpu"} | kwargs))
    text = str(caught.value)
    assert "\n" not in text and text.endswith("."), text
    assert ";" in text, "a mend belongs to it"
    return text


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def replace_model(folder, model):
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder)


# ---------------------------------------------------------------- what is good


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_loads_bit_for_bit_and_quietly(kind, tied, tmp_path, capfd):
    model = make_model(kind, tied)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, tokenizer = load_model(tmp_path, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert not loaded.training and type(loaded) is type(model)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    same = loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert same == tied
    assert tokenizer.decode(tokenizer("Lima").input_ids) == "Lima"
    assert loaded.name_or_path == str(tmp_path.resolve())


def test_shards_load_like_one_file(good, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    make_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(load_model(tmp_path, device="cpu")[0](IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_exactly_on_cpu(stored, tmp_path):
    model = make_model().to(stored)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    loaded, _ = load_model(tmp_path, device="cpu")
    assert loaded.dtype == torch.float32
    for (name, a), (_, b) in zip(loaded.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b.float()), name
    assert load_model(tmp_path, device="cpu", dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_string_with_a_tilde_and_a_path_mean_the_same(good, monkeypatch):
    monkeypatch.setenv("HOME", str(good.parent))
    assert find_checkpoint("~/good") == find_checkpoint(good) == good


# ---------------------------------------------------------------- one fault each


def _cut(name):
    def fault(f):
        data = (f / name).read_bytes()
        (f / name).write_bytes(data[: len(data) // 2])

    return fault


def _pickle(f):
    torch.save(load_file(f / "model.safetensors"), f / "pytorch_model.bin")
    (f / "model.safetensors").unlink()


def _lose_shard(f):
    (f / "model.safetensors").unlink()
    make_model().save_pretrained(f, max_shard_size="60KB")
    (f / "model-00002-of-00003.safetensors").unlink()


def _cut_shard(f):
    (f / "model.safetensors").unlink()
    make_model().save_pretrained(f, max_shard_size="60KB")
    _cut("model-00002-of-00003.safetensors")(f)


def _grow_tokenizer(f):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(f)


def _no_embedding_when_tied(f):
    replace_model(f, make_model(tied=True))
    edit_weights(f, lambda w: w.pop("model.embed_tokens.weight"))


def _write(name, data):
    return lambda f: (f / name).write_bytes(data)


FAULTS = {
    "config missing": (lambda f: (f / "config.json").unlink(), r"no config\.json"),
    "config cut": (_cut("config.json"), r"config\.json, line \d+, column \d+: not valid JSON"),
    "config a list": (_write("config.json", b"[1]"), r"config\.json: holds no JSON object"),
    "config not utf-8": (_write("config.json", b"\xff{}"), r"config\.json: cannot be read"),
    "config without a type": (_write("config.json", b"{}"), r"config\.json: model type \(none\)"),
    "type unknown": (lambda f: edit_config(f, model_type="zorp"), r"config\.json: model type zorp"),
    "config impossible": (lambda f: edit_config(f, hidden_size="wide"), r"config\.json: .*llama"),
    "heads do not divide": (lambda f: edit_config(f, num_attention_heads=5), "broken: cannot|conf"),
    "encoder": (
        lambda f: replace_model(f, BertForMaskedLM(BertConfig(vocab_size=V, **SIZE))),
        r"config\.json: model type bert is an encoder, .*causal",
    ),
    "encoder-decoder": (
        lambda f: replace_model(
            f, T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=32, d_kv=8, d_ff=32))
        ),
        r"config\.json: model type t5 is an encoder-decoder",
    ),
    "a model of images": (lambda f: edit_config(f, model_type="vit"), "vit is no language model"),
    "weights missing": (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors"),
    "pickle": (_pickle, r"a pickle \(pytorch_model\.bin\).* convert it once with python -c"),
    "weights cut": (_cut("model.safetensors"), r"model\.safetensors: has .* bytes where 156,\d+"),
    "weights empty": (_write("model.safetensors", b""), r"model\.safetensors: is no whole"),
    "weights a web page": (_write("model.safetensors", b"<html>" * 99), "is no whole safetensors"),
    "git lfs": (_write("model.safetensors", b"version https://git-lfs"), "git lfs pull"),
    "shard missing": (_lose_shard, "model-00002-of-00003"),
    "shard cut": (_cut_shard, "model-00002-of-00003.safetensors: has"),
    "weight missing": (lambda f: edit_weights(f, lambda w: w.pop(UP)), r"1 missing .*up_proj"),
    "head missing": (
        lambda f: replace_model(f, LlamaModel(make_model().config)),
        r"1 missing \(lm_head\.weight\).* saved as LlamaModel",
    ),
    "tied rows missing": (_no_embedding_when_tied, r"missing \(.*embed_tokens"),
    "weight of another shape": (
        lambda f: edit_weights(f, lambda w: w.update({UP: torch.ones(60, 32)})),
        r"of another shape \(.*up_proj.weight \[60, 32\] for \[64, 32\]\)",
    ),
    "weight too many": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.ones(1))),
        r"1 too many \(extra\).*strict=False",
    ),
    "layers lost from config": (lambda f: edit_config(f, num_hidden_layers=1), "9 too many"),
    "layers added in config": (lambda f: edit_config(f, num_hidden_layers=3), "9 missing"),
    "tokenizer missing": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        r"holds no tokenizer.*tokenizer\.json",
    ),
    "tokenizer cut": (_cut("tokenizer.json"), r"tokenizer\.json, line \d+"),
    "tokenizer of nonsense": (_write("tokenizer.json", b"{}"), "tokenizer cannot be loaded"),
    "tokenizer too large": (_grow_tokenizer, r"ids up to 280 \('<new>'\).* only 280 rows"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_broken_checkpoint_is_refused_in_one_sentence(name, copy):
    fault, pattern = FAULTS[name]
    fault(copy)
    text = refusal(copy)
    assert str(copy) in text
    assert re.search(pattern, text), text


def test_nothing_is_printed_when_it_is_refused(copy, capfd):
    edit_weights(copy, lambda w: w.pop(UP))
    refusal(copy)
    assert capfd.readouterr() == ("", "")


def test_the_conversion_that_the_message_gives_works(copy):
    _pickle(copy)
    code = re.search(r'python -c "(.*)"', refusal(copy)).group(1)
    with quiet():
        exec(code)  # noqa: S102 - the line that the user is told to run
    loaded, _ = load_model(copy, device="cpu")
    assert torch.equal(loaded(IDS).logits, make_model()(IDS).logits)


def test_strict_false_accepts_extra_weights_and_nothing_else(copy):
    edit_weights(copy, lambda w: w.update(extra=torch.ones(1)))
    loaded, _ = load_model(copy, device="cpu", strict=False)
    assert torch.equal(loaded(IDS).logits, make_model()(IDS).logits)
    edit_weights(copy, lambda w: w.pop(UP))
    assert "up_proj" in refusal(copy, strict=False)


def test_a_bert_that_is_a_decoder_is_a_causal_model(copy):
    from transformers.models.bert import BertLMHeadModel

    replace_model(copy, BertLMHeadModel(BertConfig(vocab_size=V, is_decoder=True, **SIZE)))
    assert type(load_model(copy, device="cpu")[0]) is BertLMHeadModel


def test_trainer_output_points_at_its_checkpoints(good, tmp_path):
    shutil.copytree(good, tmp_path / "run" / "checkpoint-500")
    assert f"give {tmp_path}/run/checkpoint-500." in refusal(tmp_path / "run")


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_value_in_config_loads_or_is_refused(good, tmp_path_factory, data):
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("fuzz") / "x"))
    key = data.draw(st.sampled_from(sorted(json.loads((good / "config.json").read_text()))))
    odd = st.sampled_from([None, -1, 0, 1, 3, 1.5, "x", [], {}, True, "../x", 65])
    edit_config(folder, **{key: data.draw(odd)})
    try:
        load_model(folder, device="cpu")
    except InputError as e:
        assert str(folder) in str(e) and "\n" not in str(e)


# ---------------------------------------------------------------- safetensors headers


def test_header_equals_the_library_s(good):
    header = read_header(good / "model.safetensors")
    with safe_open(good / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(header)
        for name, (dtype, shape) in header.items():
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (dtype, shape)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 10_000), seed=st.integers(0, 3))
def test_a_file_cut_anywhere_is_refused(cut, seed, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"cut{seed}.safetensors"
    save_file({f"w{i}": torch.ones(i, seed + 1) for i in range(1, 6)}, path)
    data = path.read_bytes()
    assert len(read_header(path)) == 5
    path.write_bytes(data[: cut % len(data)])
    with pytest.raises(InputError, match="safetensors"):
        read_header(path)


@settings(max_examples=200, deadline=None)
@given(head=st.integers(0, 40), body=st.binary(max_size=60) | st.text(max_size=40))
def test_any_bytes_are_refused_as_input(head, body, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    body = body if isinstance(body, bytes) else json.dumps({"w": body}).encode()
    path.write_bytes(head.to_bytes(8, "little") + body)
    with pytest.raises(InputError):
        read_header(path)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", ["./none", "../none", "/none", "~/none", "a/b/c", "runs/x/", ".", "", "a\\b\\c"]
)
def test_what_looks_like_a_path_is_never_asked_for_on_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    text = refusal(name)
    assert "no such folder" in text or "no config.json" in text


def test_a_folder_wins_over_a_hub_name(good, monkeypatch):
    monkeypatch.chdir(good.parent)
    monkeypatch.setattr(load, "snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    loaded, _ = load_model("good", device="cpu")
    assert loaded.name_or_path == str(good.resolve())


def _hub(monkeypatch, answer):
    def download(name, **kwargs):
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(load, "snapshot_download", download)


def test_a_hub_model_keeps_its_name(good, monkeypatch):
    _hub(monkeypatch, good)
    loaded, tokenizer = load_model("owner/model", device="cpu")
    assert loaded.name_or_path == loaded.config.name_or_path == "owner/model"
    assert tokenizer.name_or_path == "owner/model"


def test_an_unreachable_hub_is_told_with_the_three_ways_out(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    _hub(monkeypatch, LocalEntryNotFoundError("Got: ConnectError: [Errno -2]\nAn error happened"))
    text = refusal("owner/model")
    assert text.startswith("owner/model: is neither a folder here nor a model in the local cache")
    assert "hf download owner/model" in text and "HF_HOME" in text and "or give a folder" in text


def test_a_name_that_the_hub_does_not_have(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    _hub(monkeypatch, error)
    assert "check the name, log in with `hf auth login`" in refusal("owner/modle")


def test_a_name_that_no_hub_model_can_have():
    assert "it can't be downloaded (Repo id must" in refusal("spaced name")


def test_a_half_downloaded_hub_model_is_named_by_what_is_lost(copy, monkeypatch):
    from huggingface_hub.errors import IncompleteSnapshotError

    (copy / "model.safetensors").unlink()
    _hub(monkeypatch, IncompleteSnapshotError("incomplete", snapshot_path=str(copy)))
    assert "weights are missing (model.safetensors)" in refusal("owner/model")


def test_from_the_hub_come_no_pickles_and_no_code():
    from huggingface_hub.utils import filter_repo_objects

    seen = {}

    def download(name, **kwargs):
        seen.update(kwargs)
        return "/nowhere"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "snapshot_download", download)
        find_checkpoint("owner/model")
    files = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "vocab.txt"]
    files += ["model.safetensors.index.json", "tokenizer.model", "chat_template.jinja"]
    others = ["pytorch_model.bin", "modeling_x.py", "onnx/model.onnx", "fp16/model.safetensors"]
    assert sorted(filter_repo_objects(files + others, **seen)) == sorted(files)


def _atlas(monkeypatch, folder):
    facts = types.ModuleType("instruct_ft.atlas.facts")
    facts.atlas_path = lambda name: Path(folder) / name
    monkeypatch.setitem(sys.modules, "instruct_ft.atlas", types.ModuleType("instruct_ft.atlas"))
    monkeypatch.setitem(sys.modules, "instruct_ft.atlas.facts", facts)


def test_atlas_names(good, monkeypatch):
    _atlas(monkeypatch, good.parent)
    assert load_model("atlas:good", device="cpu")[0].name_or_path == str(good.resolve())
    text = refusal("atlas:bad")
    assert text.startswith("atlas:bad: no such model in") and "holds good; make the" in text


# ---------------------------------------------------------------- no code from a checkpoint


@pytest.mark.parametrize("model_type", ["llama", "zorp"])
def test_code_in_a_checkpoint_is_never_run(model_type, copy, tmp_path, capfd):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').close()\n"
    code += "from transformers import LlamaConfig as C, LlamaForCausalLM as M\n"
    (copy / "evil.py").write_text(code)
    maps = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit_config(copy, model_type=model_type, auto_map=maps)
    path = copy / "tokenizer_config.json"
    tokens = json.loads(path.read_text()) | {"auto_map": {"AutoTokenizer": ["evil.C", "evil.C"]}}
    path.write_text(json.dumps(tokens))
    try:
        load_model(copy, device="cpu")
    except InputError as e:
        assert "never run" in str(e)
    assert not marker.exists()
    assert "[y/N]" not in capfd.readouterr().out


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("value", ["owner/kernel", {"": "owner/kernel"}])
def test_no_kernel_is_fetched_because_a_config_asks(key, value, copy):
    edit_config(copy, **{key: value})
    loaded, _ = load_model(copy, device="cpu")
    assert loaded.config._attn_implementation in ("sdpa", "eager")


def test_config_cannot_name_another_weights_file(copy):
    torch.save({}, copy / "adapter_model.bin")
    edit_config(copy, transformers_weights="adapter_model.bin")
    loaded, _ = load_model(copy, device="cpu")
    assert torch.equal(loaded(IDS).logits, make_model()(IDS).logits)


# ---------------------------------------------------------------- adapters


@pytest.fixture
def adapter(good, tmp_path):
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        target_modules="all-linear",
        init_lora_weights=False,
        trainable_token_indices=[1, 2],
    )
    with quiet():
        model = get_peft_model(load_model(good, device="cpu")[0], config).eval()
        delta = model.get_input_embeddings().token_adapter.trainable_tokens_delta["default"]
        delta.data += 0.5
        model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(IDS).logits


def test_an_adapter_loads_with_its_base(adapter, good, capfd):
    folder, truth = adapter
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded, tokenizer = load_model(folder, device="cpu")
    assert capfd.readouterr() == ("", "")
    assert isinstance(loaded, PeftModel) and not loaded.training
    assert torch.equal(loaded(IDS).logits, truth)
    learns = [n for n, p in loaded.named_parameters() if p.requires_grad]
    assert learns and all("lora_" in n or "trainable_tokens" in n for n in learns)
    assert len(tokenizer) == V
    assert loaded.peft_config["default"].base_model_name_or_path == str(good.resolve())


def test_an_adapter_s_own_tokenizer_comes_first(adapter):
    folder, _ = adapter
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(folder)
    assert load_model(folder, device="cpu")[1].chat_template == "{{ messages[0].content }}"


def _rebase(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def test_a_base_that_moved(adapter, good, monkeypatch, tmp_path):
    folder, truth = adapter
    _rebase(folder, "/gone/base/model")
    text = refusal(folder)
    assert str(folder) in text and "/gone/base/model: no such folder" in text
    assert torch.equal(load_model(folder, device="cpu", base=good)[0](IDS).logits, truth)
    _rebase(folder, None)
    assert "pass the base as base=" in refusal(folder)
    shutil.copytree(good, folder / "base")
    _rebase(folder, "base")
    assert torch.equal(load_model(folder, device="cpu")[0](IDS).logits, truth)
    _atlas(monkeypatch, good.parent)
    _rebase(folder, "/elsewhere/site-packages/instruct_ft/assets/good")
    assert torch.equal(load_model(folder, device="cpu")[0](IDS).logits, truth)
    _rebase(folder, "atlas:good")
    assert torch.equal(load_model(folder, device="cpu")[0](IDS).logits, truth)


def test_a_broken_base_is_named_through_its_adapter(adapter, copy):
    folder, _ = adapter
    edit_weights(copy, lambda w: w.pop(UP))
    text = refusal(folder, base=copy)
    assert str(folder) in text and str(copy) in text and "up_proj" in text


@pytest.mark.parametrize("lost", ["layers.1.mlp.up_proj.lora_B", "trainable_tokens_delta"])
def test_an_adapter_with_a_weight_missing_is_refused(adapter, lost):
    folder, _ = adapter
    file = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if lost not in k}, file)
    text = refusal(folder)
    assert "1 missing" in text and lost in text


def test_an_adapter_for_another_model_is_refused(adapter, tmp_path):
    folder, _ = adapter
    torch.manual_seed(0)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=V, **(SIZE | {"intermediate_size": 96})))
    other.save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    text = refusal(folder, base=tmp_path / "other")
    assert "of another shape" in text and "base=" in text


def test_adapters_without_safetensors_and_on_adapters(adapter, good):
    folder, _ = adapter
    assert "is an adapter itself" in refusal(folder, base=folder)
    (folder / "adapter_model.safetensors").rename(folder / "x")
    assert "no adapter_model.safetensors" in refusal(folder)
    torch.save({}, folder / "adapter_model.bin")
    assert "only a pickle" in refusal(folder)
    assert "no adapter" in refusal(good, base=good)


def test_a_broken_adapter_config(adapter):
    folder, _ = adapter
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"')
    assert "adapter_config.json, line 1" in refusal(folder)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}')
    assert str(folder) in refusal(folder)


# ---------------------------------------------------------------- device, dtype, card


def test_device_and_dtype_by_name():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype(torch.float16, torch.device("cpu")) == torch.float16
    for wrong in ("toaster", "meta", "cuda:99"):
        with pytest.raises(InputError, match=wrong):
            pick_device(wrong)
    with pytest.raises(InputError, match="int8"):
        pick_dtype("int8", torch.device("cpu"))
    with pytest.raises(InputError, match="task sorting"):
        load_model("x", task="sorting")


def test_bfloat16_on_cuda_where_it_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert pick_dtype(None, torch.device("cuda")) == torch.float32


@pytest.mark.parametrize("tied", [True, False])
def test_card_counts_each_parameter_once(tied, good):
    model = make_model(tied=tied)
    card = model_card(model)
    assert card["parameters"] == model.num_parameters() == card["embedding"] + card["body"]
    assert card["embedding"] == V * 32 * (1 if tied else 2)
    assert card["trainable"] == card["parameters"] and card["adapter"] == 0
    model.get_input_embeddings().weight.requires_grad_(False)
    assert model_card(model)["trainable"] == card["parameters"] - V * 32


def test_card_with_an_adapter(adapter):
    folder, _ = adapter
    model, _ = load_model(folder, device="cpu")
    card, plain = model_card(model), model_card(make_model())
    assert card["model"] == "LlamaForCausalLM"
    assert card["trainable"] == card["adapter"] == model.get_nb_trainable_parameters()[0]
    assert (card["embedding"], card["body"]) == (plain["embedding"], plain["body"])
    assert card["parameters"] == plain["parameters"] + card["adapter"]


@pytest.mark.parametrize("level", [hf_logging.WARNING, hf_logging.INFO])
def test_quiet_puts_everything_back(level, capfd, monkeypatch):
    monkeypatch.setattr(hf_logging._get_library_root_logger(), "level", level)
    bars = hf_logging.is_progress_bar_enabled()
    with pytest.raises(KeyError), quiet():
        warnings.warn("hush", stacklevel=1)
        hf_logging.get_logger("transformers.x").warning("hush")
        raise KeyError
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (level, bars)
    assert "hush" not in "".join(capfd.readouterr())


def test_what_was_saved_by_the_ecosystem_loads_there_too(good, tmp_path):
    loaded, tokenizer = load_model(good, device="cpu")
    loaded.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "transformers_weights" not in saved and "name_or_path" not in saved

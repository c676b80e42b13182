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
from transformers.models.bert import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
)
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel
from transformers.models.roberta import RobertaConfig, RobertaForMaskedLM
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


# ---------------------------------------------------------------- six tasks, four families

LABELS = ["no", "yes", "unknown"]
HEADS = ("classification", "tagging", "questions")
ALLOWED = {
    "bert": ("masked", *HEADS),
    "roberta": ("masked", *HEADS),
    "llama": ("causal", *HEADS),
    "gpt": ("causal", *HEADS),
    "t5": ("seq2seq", "classification", "questions"),
}


def make_family(family):
    torch.manual_seed(1)
    if family == "bert":
        return BertForMaskedLM(BertConfig(vocab_size=V, **SIZE))
    if family == "roberta":
        return RobertaForMaskedLM(RobertaConfig(vocab_size=V, max_position_embeddings=66, **SIZE))
    if family == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=V,
                d_model=32,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )
    return make_model({"gpt": "gpt2"}.get(family, family))


def family_words(family):
    "A tokenizer with the special tokens of a family, or without padding as GPT-2 has it"
    tokenizer = make_tokenizer()
    if family in ("llama", "gpt"):
        tokenizer.pad_token = None
    else:
        tokenizer.mask_token = "<|im_start|>"
    return tokenizer


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    root = tmp_path_factory.mktemp("families")
    for family in ALLOWED:
        make_family(family).save_pretrained(root / family)
        family_words(family).save_pretrained(root / family)
    return root


def fetch(folder, task, **kwargs):
    labels = kwargs.pop("labels", LABELS if task in ("classification", "tagging") else None)
    return load_model(folder, task, device="cpu", labels=labels, **kwargs)


def body_of(model):
    "Weights of the body by the name they have in every class"
    drop = ("bert.", "roberta.", "model.", "transformer.")
    own = {}
    for name, weight in model.state_dict().items():
        if name in getattr(model, "new_weights", ()):
            continue
        for prefix in drop:
            name = name.removeprefix(prefix)
        own[name] = weight
    return own


@pytest.mark.parametrize("task", load.TASKS)
@pytest.mark.parametrize("family", ALLOWED)
def test_each_family_loads_for_its_tasks_with_its_own_body(family, task, zoo, tmp_path):
    if task not in ALLOWED[family]:
        text = refusal(
            zoo / family,
            task=task,
            labels=LABELS if task in ("classification", "tagging") else None,
        )
        assert "config.json: model type" in text
        return
    model, tokenizer = fetch(zoo / family, task)
    source, loaded = body_of(make_family(family)), body_of(model)
    assert bool(model.new_weights) == (task in HEADS)
    assert loaded and all(torch.equal(source[name], w) for name, w in loaded.items())
    assert not any(re.search(r"layers?\.\d|block\.|h\.\d|embed|wte", n) for n in model.new_weights)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = fetch(tmp_path, task, labels=None)
    plain = load.TASKS[task].from_pretrained(tmp_path)
    assert again.new_weights == () and again.config.id2label == model.config.id2label
    for other in (again, plain):
        pairs = zip(other.state_dict().items(), model.state_dict().items(), strict=True)
        assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("family", ALLOWED)
def test_a_gap_in_the_body_is_an_error_for_every_head(family, zoo, tmp_path):
    folder = Path(shutil.copytree(zoo / family, tmp_path / "x"))
    lost = next(
        n
        for n in load_file(folder / "model.safetensors")
        if re.search(r"(layers?|block|h)\.1\..*(query|q_proj|c_fc|\.q\.).*weight", n)
    )
    edit_weights(folder, lambda w: w.pop(lost))
    for task in ALLOWED[family]:
        labels = LABELS if task in ("classification", "tagging") else None
        assert "1 missing" in refusal(folder, task=task, labels=labels)


def test_a_new_head_is_said_once_and_shown_on_the_card(zoo, caplog):
    load._say.cache_clear()
    for _ in range(2):
        model, _ = fetch(zoo / "roberta", "tagging")
    assert len(caplog.records) == 1 and "classifier.weight are new" in caplog.text
    card = model_card(model)
    assert card["new"] == ["classifier.bias", "classifier.weight"] and card["head"] == 3 * 33
    assert card["parameters"] == sum(card[k] for k in ("embedding", "body", "head", "adapter"))


def test_a_new_head_has_weights_of_the_usual_spread(zoo):
    model, _ = fetch(zoo / "bert", "classification", labels=[f"c{i}" for i in range(50)])
    assert 0.015 < model.classifier.weight.std() < 0.025
    assert not model.classifier.bias.any()


def test_labels_come_back_in_their_order_beyond_ten(zoo, tmp_path):
    labels = [f"class {i}" for i in range(12)]
    model, tokenizer = fetch(zoo / "bert", "classification", labels=labels)
    assert model.config.label2id == {name: i for i, name in enumerate(labels)}
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = fetch(tmp_path, "classification", labels=labels)
    assert [again.config.id2label[i] for i in range(12)] == labels and not again.new_weights
    assert "strict=False" in refusal(tmp_path, task="classification", labels=labels[::-1])
    assert "class 0" in refusal(tmp_path, task="classification", labels=["a", "b"])
    fresh, _ = fetch(tmp_path, "classification", labels=labels[::-1], strict=False)
    assert fresh.new_weights == ("classifier.bias", "classifier.weight")
    assert not torch.equal(fresh.classifier.weight, model.classifier.weight)
    assert torch.equal(fresh.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert fetch(tmp_path, "classification", labels=["a"], strict=False)[0].num_labels == 1


@pytest.mark.parametrize(
    "first, then", [("tagging", "classification"), ("classification", "tagging")]
)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_head_of_another_task_is_never_taken(family, first, then, zoo, tmp_path):
    old, tokenizer = fetch(zoo / family, first)
    old.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = fetch(tmp_path, then)
    name = next(n for n in model.new_weights if n.startswith(("classifier.w", "score.w")))
    assert not torch.equal(model.state_dict()[name], old.state_dict()[name])


def test_a_span_head_has_two_outputs_whatever_was_before(zoo, tmp_path):
    old, tokenizer = fetch(zoo / "bert", "classification")
    old.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = fetch(tmp_path, "questions")
    assert model.qa_outputs.out_features == 2
    assert model(IDS, start_positions=IDS[:, 0] % 12, end_positions=IDS[:, 1] % 12).loss.isfinite()


def test_a_saved_head_with_a_gap_is_not_made_new(zoo, tmp_path):
    old, tokenizer = fetch(zoo / "roberta", "classification")
    old.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda w: w.pop("classifier.dense.weight"))
    assert "1 missing (classifier.dense.weight)" in refusal(tmp_path, task="classification")


def test_heads_of_pretraining_are_left_behind_and_strangers_are_not(zoo, tmp_path):
    from transformers import BertForPreTraining

    torch.manual_seed(1)
    BertForPreTraining(BertConfig(vocab_size=V, **SIZE)).save_pretrained(tmp_path)
    family_words("bert").save_pretrained(tmp_path)
    for task in ALLOWED["bert"]:  # pooler and next-sentence head, as bert-base has them
        model, _ = fetch(tmp_path, task)
        assert "bert.pooler.dense.weight" not in model.new_weights
    edit_weights(tmp_path, lambda w: w.update(stranger=torch.ones(1)))
    assert "1 too many (stranger)" in refusal(tmp_path, task="tagging", labels=LABELS)
    assert fetch(tmp_path, "tagging", strict=False)[0].new_weights


@pytest.mark.parametrize("labels", ["yes", [], ["a", "a"], ["a", ""], ["a", 1]])
def test_labels_that_are_none(labels, zoo):
    with pytest.raises(InputError, match="labels="):
        fetch(zoo / "bert", "tagging", labels=labels)


def test_labels_belong_to_classification_and_tagging(zoo):
    assert "labels=[…]" in refusal(zoo / "bert", task="tagging")
    for family, task in (("llama", "causal"), ("bert", "questions"), ("t5", "seq2seq")):
        assert "has no labels" in refusal(zoo / family, task=task, labels=LABELS)
    with pytest.raises(InputError, match="classify: unknown; give one of causal, masked"):
        load_model(zoo / "bert", "classify")


@pytest.mark.parametrize("family", ["gpt", "llama"])
def test_a_decoder_classifies_a_padded_row_as_it_does_the_row_alone(family, zoo):
    model, tokenizer = fetch(zoo / family, "classification")
    tokenizer.padding_side = "right"
    assert tokenizer.pad_token_id == model.config.pad_token_id == tokenizer.eos_token_id
    texts = ["Peru", "The capital of Chile is Santiago"]
    with torch.no_grad():
        both = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        for row, text in zip(both, texts, strict=True):
            alone = model(**tokenizer(text, return_tensors="pt")).logits[0]
            torch.testing.assert_close(row, alone, atol=1e-6, rtol=0)


def test_a_causal_model_keeps_its_tokenizer_as_it_was(zoo):
    assert fetch(zoo / "gpt", "causal")[1].pad_token is None


def test_a_tokenizer_without_pad_or_mask(zoo, tmp_path):
    folder = Path(shutil.copytree(zoo / "gpt", tmp_path / "x"))
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    assert "neither pad nor end" in refusal(folder, task="classification", labels=LABELS)
    folder = Path(shutil.copytree(zoo / "bert", tmp_path / "y"))
    make_tokenizer().save_pretrained(folder)
    assert "no mask token" in refusal(folder, task="masked")


def test_an_adapter_brings_its_head_and_knows_its_task(zoo, tmp_path):
    torch.manual_seed(0)
    model, _ = fetch(zoo / "bert", "classification")
    with quiet():
        tuned = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2)).eval()
        tuned.save_pretrained(tmp_path)
    again, _ = fetch(tmp_path, "classification")
    assert not any("classifier" in name for name in again.new_weights)
    head = "base_model.model.classifier.modules_to_save.default.weight"
    assert torch.equal(again.state_dict()[head], tuned.state_dict()[head])
    assert "ask for task='classification'" in refusal(tmp_path, task="masked")


# ---------------------------------------------------------------- device_map, quantize


def test_a_device_map_loads_the_same_weights(good):
    model, _ = load_model(good, device_map={"": "cpu"})
    assert torch.equal(model(IDS).logits, make_model()(IDS).logits)


def test_places_and_quantisers_that_do_not_work(good, monkeypatch):
    assert "two answers" in refusal(good, device_map="auto")
    assert "device_map='all'" in refusal(good, device="auto", device_map="all")
    assert "give int8 or nf4" in refusal(good, quantize="int4")
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    assert "pip install torchao" in refusal(good, quantize="int8")
    assert "pip install bitsandbytes" in refusal(good, quantize="nf4")
    assert "pip install accelerate" in refusal(good, device="auto", device_map="auto")


@pytest.mark.parametrize("how, package", [("int8", "torchao"), ("nf4", "bitsandbytes")])
def test_a_quantised_body_keeps_its_head_whole(how, package, zoo):
    pytest.importorskip(package)
    model, _ = load_model(zoo / "llama", device="cpu", quantize=how)
    truth = make_family("llama")(IDS).logits
    assert 0 < (model(IDS).logits - truth).abs().max() / truth.std() < 1
    assert type(model.lm_head.weight) is torch.nn.Parameter
    tagger, _ = fetch(zoo / "bert", "tagging", quantize=how)
    assert type(tagger.classifier.weight) is torch.nn.Parameter
    assert tagger(IDS).logits.isfinite().all()
    assert model.get_memory_footprint() > 0
    with pytest.raises(InputError, match="quantised"):
        load.training_memory(model, 2, 8)


def test_a_checkpoint_that_is_quantised_is_not_quantised_again(copy, monkeypatch):
    edit_config(copy, quantization_config={"quant_method": "gptq", "bits": 4})
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: object())
    assert "quantised already" in refusal(copy, quantize="nf4")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("method", load.METHODS)
def test_weights_gradients_and_moments_are_what_a_step_leaves(method):
    model = BertForSequenceClassification(BertConfig(vocab_size=V, **SIZE))
    found = load.training_memory(model, 2, 8, method)
    real = load._prepare(model, method, 8).train()
    learns = [p for p in real.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, fused=True)
    real(**load._example(real, 2, 8)).loss.backward()
    optimizer.step()
    moments = [t for state in optimizer.state.values() for k, t in state.items() if k != "step"]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / 2**20
    assert found["weights"] == pytest.approx(size([*real.parameters(), *real.buffers()]), abs=0.001)
    assert found["gradients"] == pytest.approx(
        size([p.grad for p in real.parameters() if p.grad is not None]), abs=0.001
    )
    assert found["optimizer"] == pytest.approx(size(moments), abs=0.001)


@pytest.mark.parametrize("family", ["bert", "llama", "gpt", "t5"])
def test_activations_are_what_autograd_keeps(family):
    model = make_family(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    dry = load.training_memory(model, 3, 24, "full")["activations"] * 2**20
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held = {}

    def pack(t):
        held[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    data = load._example(model.train(), 3, 24)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(**data)
    kept = sum(s.nbytes() for key, s in held.items() if key not in own)
    assert kept <= dry * 1.02 and dry < 1.6 * kept  # besides: inputs, logits, caches that live on
    assert out.loss.isfinite()


def test_memory_leaves_the_model_as_it_was():
    model = make_model()
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    for method in (None, *load.METHODS):
        load.training_memory(model, 2, 8, method)
    for name, p in model.named_parameters():
        assert p.requires_grad == before[name][0] and torch.equal(p, before[name][1])
    assert not model.training and not hasattr(model, "peft_config")


def test_frozen_parts_and_adapters_count_as_they_stand():
    model = make_model()
    everything = load.training_memory(model, 2, 16)
    model.get_input_embeddings().requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    frozen = load.training_memory(model, 2, 16)
    assert frozen["gradients"] < everything["gradients"]
    assert frozen["activations"] < everything["activations"]
    with quiet():
        tuned = get_peft_model(make_model(), LoraConfig(r=8, target_modules="all-linear"))
    assert load.training_memory(tuned, 2, 16) == load.training_memory(make_model(), 2, 16, "lora")


def test_memory_that_cannot_be_told():
    with pytest.raises(InputError, match="give one of full, lora, head"):
        load.training_memory(make_model(), 2, 8, "qlora")
    for batch, length in ((0, 8), (2, 1), (2.0, 8)):
        with pytest.raises(InputError, match="batch"):
            load.training_memory(make_model(), batch, length)
    with pytest.raises(InputError, match="nothing learns"):
        load.training_memory(make_model(tied=True), 2, 8, "head")
    with pytest.raises(InputError, match="none of the tasks"):
        load.training_memory(LlamaModel(make_model().config), 2, 8)
    with pytest.raises(InputError, match="64 positions"):
        load.training_memory(make_model("gpt2"), 2, 65)
    assert load.training_memory(make_family("roberta"), 1, 64)["peak"] > 0

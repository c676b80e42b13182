import copy
import threading

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from instruct_ft.eval import generate as module
from instruct_ft.eval.generate import Answer, generate, stream
from instruct_ft.model.adapters import add_lora
from instruct_ft.settings import InputError, set_seed
from instruct_ft.tokenization.encode import TEMPLATES, encode, encode_prompt, stop_ids

WORDS = "red green blue sky sea sun moon tree stone river 天 地 人 山 水".split()


def make_tokenizer(pad="<|endoftext|>"):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    how = dict(vocab_size=300, special_tokens=control, show_progress=False)
    how["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator([" ".join(WORDS)] * 3, trainers.BpeTrainer(**how))
    names = dict(pad_token=pad, eos_token=control[2], chat_template=TEMPLATES["chatml"].jinja)
    return PreTrainedTokenizerFast(tokenizer_object=tok, **names)


TOK = make_tokenizer()
SIZE = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
SIZE |= dict(vocab_size=len(TOK), max_position_embeddings=128, initializer_range=0.4)
IDS = dict(pad_token_id=0, bos_token_id=None, eos_token_id=2)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.4)
CONFIGS = dict(
    llama=LlamaConfig(**SIZE, **IDS, num_key_value_heads=2),
    gpt2=GPT2Config(vocab_size=len(TOK), **GPT2, **IDS),
    neox=GPTNeoXConfig(**SIZE, **IDS),
)


def make(kind="llama", dtype=torch.float64):
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).to(dtype).eval()
    if kind == "llama":  # let random answers end now and then
        with torch.no_grad():
            model.lm_head.weight[2] *= 2.5
    return model


def ask(text, *answer):
    turns = zip(("user", "assistant", "user"), (text, *answer), strict=False)
    return [dict(role=role, content=content) for role, content in turns]


TALKS = [ask(" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5])) for i in range(13)]
TALKS += [ask("sky", "blue", "sea"), ask("red", "green"), ask("山水 " * 8)]


@torch.no_grad()
def by_hand(model, messages, new=6):
    "The likeliest token again and again, without cache, batch or `generate`"
    ids = encode_prompt(messages, TOK)
    for _ in range(new):
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] == 2:
            break
    ids = ids[len(encode_prompt(messages, TOK)) :]
    stopped = ids[-1] == 2
    ids = ids[: len(ids) - stopped]
    return Answer(TOK.decode(ids, skip_special_tokens=True), ids, stopped)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_batch_gives_the_answers_that_each_gets_alone(kind):
    model = make(kind)
    wanted = [by_hand(model, messages) for messages in TALKS]
    for size in (1, 5, 64):
        assert generate(model, TOK, TALKS, max_new_tokens=6, batch_size=size) == wanted
    assert generate(model, TOK, TALKS[::-1], max_new_tokens=6) == wanted[::-1]
    if kind == "llama":
        assert {a.stopped for a in wanted} == {True, False}


@pytest.mark.parametrize("kind", CONFIGS)
def test_padding_on_the_left_leaves_the_logits_alone(kind):
    model, seen = make(kind), []
    hook = model.register_forward_hook(lambda m, args, out: seen.append(out.logits[:, -1]))
    generate(model, TOK, TALKS, max_new_tokens=1)
    hook.remove()
    prompts = sorted((encode_prompt(m, TOK) for m in TALKS), key=lambda p: -len(p))
    assert len({len(p) for p in prompts}) > 5 and len(seen) == 1
    for row, prompt in zip(seen[0], prompts, strict=True):
        with torch.no_grad():
            alone = model(torch.tensor([prompt])).logits[0, -1]
        assert float((row - alone).abs().max()) < 1e-5 * float(alone.abs().max())


def test_an_adapter_answers_for_itself():
    model = add_lora(make(), rank=2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, generator=torch.Generator().manual_seed(1))
    found = generate(model, TOK, TALKS, max_new_tokens=6)
    assert found == [by_hand(model, m) for m in TALKS]
    with model.disable_adapter():
        assert found != generate(model, TOK, TALKS, max_new_tokens=6)


def test_the_end_may_be_the_padding_and_every_stop_token_counts(monkeypatch):
    model, tok = make(), make_tokenizer(pad="<|im_end|>")
    assert generate(model, tok, TALKS, max_new_tokens=6) == [by_hand(model, m) for m in TALKS]
    first = generate(model, TOK, TALKS[:1], max_new_tokens=6)[0].ids
    monkeypatch.setattr(module, "stop_ids", lambda *_: [2, first[3]])
    found = generate(model, TOK, TALKS[:1], max_new_tokens=6)[0]
    assert found == Answer(
        TOK.decode(first[: first.index(first[3])]), first[: first.index(first[3])], True
    )


def test_prompts_are_those_of_training():
    model, seen = make(), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    talk = ask("sky", "blue")
    generate(model, TOK, [talk], max_new_tokens=1)
    encoded = encode(talk, TOK)
    answer = encoded.loss_mask.index(1)
    assert seen[0].tolist() == [encoded.input_ids[:answer]]
    seen.clear()
    generate(model, TOK, [talk], max_new_tokens=1, template="plain")
    assert seen[0].tolist() == [encode_prompt(talk, TOK, "plain")]


def test_nothing_is_taken_from_the_checkpoint_and_nothing_is_left_behind(capfd, recwarn):
    model = make()
    wanted = generate(model, TOK, TALKS, max_new_tokens=6)
    shipped = model.generation_config
    shipped.repetition_penalty, shipped.do_sample, shipped.temperature = 5.0, True, 9.0
    shipped.max_new_tokens, shipped.eos_token_id = 1, None
    model.train()
    model.config.use_cache = False
    capfd.readouterr()
    assert generate(model, TOK, TALKS, max_new_tokens=6) == wanted
    assert "".join(stream(model, TOK, TALKS[0], max_new_tokens=6)) == wanted[0].text
    assert model.training and model.generation_config is shipped
    out = capfd.readouterr()
    assert (out.out, out.err, len(recwarn)) == ("", "", 0)
    with pytest.raises(RuntimeError, match="broken"):
        model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
        generate(model, TOK, TALKS)
    assert model.training and model.generation_config is shipped


def test_the_cache_is_used():
    model, widths = make(), []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    generate(model, TOK, TALKS[1:2], max_new_tokens=4)
    assert [w[1] for w in widths[1:]] == [1] * (len(widths) - 1) and len(widths) > 1


def test_a_prompt_with_little_room_is_answered_with_what_there_is():
    model = make("gpt2")
    model.config.max_position_embeddings = room = 60
    talks = [*TALKS[:4], ask("sky " * 36)]
    length = len(encode_prompt(talks[-1], TOK))
    assert 40 < length < room
    found = generate(model, TOK, talks, max_new_tokens=30)
    assert found == [by_hand(model, m, min(30, room - len(encode_prompt(m, TOK)))) for m in talks]
    assert "".join(stream(model, TOK, talks[-1], max_new_tokens=30)) == found[-1].text
    full = [TALKS[0], ask("sky " * 60)]
    with pytest.raises(
        InputError, match="Conversation 2 has .* tokens before the answer and the model reads 60"
    ):
        generate(model, TOK, full)
    with pytest.raises(InputError, match="Conversation 1 has"):
        next(stream(model, TOK, full[1]))


def test_what_cannot_be_asked_is_named():
    model = make()
    with pytest.raises(InputError, match="Conversation 2 of 2: "):
        generate(model, TOK, [TALKS[0], [dict(role="robot", content="x")]])
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        generate(model, TOK, TALKS, max_new_tokens=0)
    with pytest.raises(InputError, match="num_return_sequences"):
        generate(model, TOK, TALKS, num_return_sequences=2, do_sample=True)
    assert generate(model, TOK, []) == []


def test_sampling_follows_the_seed_and_options_reach_generate():
    model, how = make(), dict(max_new_tokens=6, do_sample=True, temperature=2.0)
    set_seed(1)
    a = generate(model, TOK, TALKS, **how)
    set_seed(1)
    assert generate(model, TOK, TALKS, **how) == a
    assert generate(model, TOK, TALKS, **how) != a
    greedy = generate(model, TOK, TALKS, max_new_tokens=6)
    assert generate(model, TOK, TALKS, max_new_tokens=6, do_sample=True, top_k=1) == greedy
    beams = generate(model, TOK, TALKS, max_new_tokens=6, num_beams=3)
    assert len(beams) == len(TALKS) and beams != greedy


def test_progress_is_reported():
    calls = []
    generate(
        make(), TOK, TALKS[:5], max_new_tokens=1, batch_size=2, progress=lambda *n: calls.append(n)
    )
    assert calls == [(2, 5), (4, 5), (5, 5)]


def test_streamed_pieces_make_up_the_answer():
    model = make()
    for talk in TALKS:
        pieces = list(stream(model, TOK, talk, max_new_tokens=12))
        assert "".join(pieces) == generate(model, TOK, [talk], max_new_tokens=12)[0].text
        assert all(pieces)


def test_characters_of_several_tokens_come_whole():
    text = "天 e\u0301 👩‍👩‍👧 冷！"
    feed = module._Feed()
    for i in [*TOK(text)["input_ids"], *stop_ids(TOK)]:
        feed.queue.put([i])
    feed.queue.put(None)
    pieces = list(module._read(feed, stop_ids(TOK), TOK))
    assert "".join(pieces) == text and len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_who_stops_reading_stops_the_model():
    model, calls = make(), []
    with torch.no_grad():
        model.lm_head.weight[2] = 0  # it would never end
    model.register_forward_hook(lambda *_: calls.append(1))
    pieces, before = stream(model, TOK, TALKS[0], max_new_tokens=90), threading.active_count()
    next(pieces)
    assert threading.active_count() == before + 1
    pieces.close()
    assert threading.active_count() == before and len(calls) < 90


def test_a_fault_of_the_model_reaches_the_reader():
    model = make()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"):
        list(stream(model, TOK, TALKS[0]))

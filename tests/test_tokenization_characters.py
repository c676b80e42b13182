"""Special characters: what is lost is named, policies are idempotent and keep the way back, tokenizers carry them."""

import json
import re
import unicodedata
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from instruct_ft.atlas.facts import atlas_path
from instruct_ft.atlas.tokenizers import FAMILIES, family_tokenizer
from instruct_ft.settings import InputError
from instruct_ft.tokenization.characters import (
    CASES,
    POLICIES,
    SAFE,
    Survey,
    explain_loss,
    normalise_text,
    show_side_by_side,
    survey,
    with_policies,
)

pytestmark = pytest.mark.filterwarnings("ignore:this tokenizer puts")
HARD = "aAé\u0301eZ ß‘’“”–—\u2212\u00a0\u3000\u2009\t\n\r\x85\x0b\0\x1b\x80\x9f\u00ad\u200b\u200c\u200d\ufeff\u202eーｶﾞＡ１！ﬁ²½İΣ中好，。قم\u0915\u094d👍🏽\u2764\ufe0f🇫🇷1\u20e3★™:/.hHtTpPsS@[]"
TEXTS = [text for group in CASES.values() for text in group]
# characters that Python and the tokenizers know alike: assigned, no lone surrogates
anything = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=25)
hard = st.text(st.sampled_from(HARD), max_size=16) | st.lists(
    st.sampled_from(TEXTS), max_size=2
).map("".join)
chosen = st.sets(st.sampled_from(sorted(set(POLICIES) - {"emoji_drop", "emoji_describe"}))).flatmap(
    lambda names: st.sampled_from([names, names | {"emoji_drop"}, names | {"emoji_describe"}])
)
quick = settings(max_examples=60, deadline=None, derandomize=True)


@pytest.fixture(scope="session")
def fast():
    return {name: family_tokenizer(name) for name in FAMILIES}


@pytest.fixture(scope="session")
def base():
    return AutoTokenizer.from_pretrained(atlas_path("decoder"))


def back(tokenizer, text):
    return tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- round trips -------------------------------------------------------------------------------


def test_g7_lossless_tokenizers_give_back_any_text(fast, base):
    lossless = [fast["gpt"], fast["roberta"], base]

    @quick
    @given(anything | hard)
    def check(text):
        for tokenizer in lossless:
            assert back(tokenizer, text) == text
            assert explain_loss(tokenizer, text).losses == []
        if text[:1] != " " and "\u2581" not in text:
            assert back(fast["llama"], text) == text

    check()


def test_g7_for_lossy_tokenizers_every_loss_is_named(fast):
    steps = {"normaliser", "pre-tokenizer", "unknown", "added token", "decoder"}

    @quick
    @given(anything | hard)
    def check(text):
        for name in ("bert", "t5", "llama"):
            report = explain_loss(fast[name], text)
            assert report.back == back(fast[name], text)
            assert bool(report.losses) == (report.back != text)
            assert set(report.steps) <= steps
            rebuilt, at = "", 0
            for (
                loss
            ) in report.losses:  # the report is complete: it turns the text into what came back
                assert text[loss.start : loss.end] == loss.gone
                rebuilt += text[at : loss.start] + loss.came
                at = loss.end
            assert rebuilt + text[at:] == report.back

    check()


def test_p12_bert_decode_is_not_reversible_and_each_step_is_named(fast):
    steps = lambda text: explain_loss(fast["bert"], text).steps
    assert steps("Full")["normaliser"] == 1
    assert steps("cafe\u0301") == {"normaliser": 1}
    assert steps("a  b") == {"pre-tokenizer": 1}
    assert steps("don't") == {"decoder": 2}
    assert steps("a ⸺ b") == {"unknown": 1}
    assert back(fast["bert"], "don't pay 5.00") == "don ' t pay 5. 00"


def test_a_step_is_blamed_for_what_it_did_and_no_other():
    vocab = {c: i for i, c in enumerate(["a", "b", " ", "<m>"])}

    def build(normalizer=None, pre=None, decoder=None, unk=None):
        core = Tokenizer(models.BPE(vocab | ({unk: 4} if unk else {}), [], unk_token=unk))
        core.normalizer, core.pre_tokenizer = normalizer, pre
        core.decoder = decoder or decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unk)

    steps = lambda tokenizer, text: list(explain_loss(tokenizer, text).steps)
    assert steps(build(), "ab a") == []
    assert steps(build(normalizers.Lowercase()), "aB") == ["normaliser"]
    assert steps(build(normalizers.Replace(Regex(" {2,}"), " ")), "a  b") == ["normaliser"]
    assert steps(build(pre=pre_tokenizers.WhitespaceSplit()), "a b") == ["pre-tokenizer"]
    assert steps(build(unk="<u>"), "aξb") == ["unknown"]
    assert steps(build(), "aξb") == ["unknown"]  # dropped by the model without a word
    assert steps(build(decoder=decoders.Replace("b", "a")), "ab") == ["decoder"]
    eats = build()
    eats.add_tokens(AddedToken("<m>", lstrip=True, normalized=False))
    assert steps(eats, "a <m>") == ["added token"]


def test_llama_cannot_tell_whether_a_text_began_with_a_space(fast):
    tok = fast["llama"]
    assert tok(" a")["input_ids"] == tok("a")["input_ids"]
    assert explain_loss(tok, " a").steps == {"pre-tokenizer": 1}


# --- the survey and the pictures ---------------------------------------------------------------


def test_p11_nfc_and_nfd_have_other_ids_unless_a_normaliser_joins_them(fast):
    same = {}
    for name, tokenizer in fast.items():
        cell = survey({name: tokenizer}, {"marks": ["café", "no accent"]}).cells["marks", name]
        assert cell.accented == 1
        same[name] = cell.same_ids
    assert same == dict(bert=1, gpt=0, roberta=0, t5=1, llama=0)
    joined = with_policies(fast["gpt"], "nfc")
    assert survey({"x": joined}, {"marks": ["café"]}).cells["marks", "x"].same_ids == 1


def test_p11_digits_cost_and_digits_apart_cost_one_each(fast, base):
    for tokenizer in (*fast.values(), base):
        apart = with_policies(tokenizer, "digits")
        pieces = [p.strip("▁#Ġ") for p in apart.tokenize("pay 1234567 now")]
        assert [p for p in pieces if p.isdigit()] == list("1234567")
    assert len(base.tokenize("1234567")) < 7
    for tokenizer in (fast["gpt"], fast["roberta"], base):  # a cut loses nothing
        assert back(with_policies(tokenizer, "digits"), "a12 3,456.7") == "a12 3,456.7"


def test_survey_counts_by_hand():
    core = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    cell = survey({"w": tok}, {"g": ["a a", "a xyz"]}).cells["g", "w"]
    assert (cell.texts, cell.characters, cell.tokens) == (2, 8, 4)
    assert (cell.unknown, cell.lost, cell.broken) == (3, 1, 0)
    assert cell.steps == {"unknown": 1}
    gpt = family_tokenizer("gpt")
    assert survey(gpt, {"g": "😁"}).cells["g", "1 TokenizersBackend"].broken == 1


def test_survey_shows_itself_as_text_html_and_plot(fast):
    hostile = {"<script>": ["<b>", ""]}
    found = survey(fast, hostile)
    assert isinstance(found, Survey)
    assert "<script>" not in found._repr_html_() and "&lt;script&gt;" in found._repr_html_()
    assert "<script>" in repr(found) and all(name in repr(found) for name in fast)
    assert len(found.plot().axes) == 4
    assert len(found.rows) == len(fast) and json.dumps(found.rows)


def test_side_by_side_escapes_and_shows_everything(fast):
    shown = show_side_by_side(["<img src=x onerror=1>\u202e\n", "a😁"], fast)
    assert "<img" not in shown._repr_html_()
    assert "\u202e" not in str(shown) and "\u202e" not in shown._repr_html_()
    assert "‹[UNK]›" in str(shown) and "f0·9f·98·81" in str(shown)
    assert show_side_by_side([], fast)._repr_html_().startswith("<table>")


def test_an_unknown_token_that_was_typed_is_an_added_token(fast):
    shown = show_side_by_side("[UNK] ξ㎎", {"bert": fast["bert"]})
    kinds = [p.kind for p in shown.rows[0][1]["bert"][0]]
    assert kinds[0] == "added" and "unknown" in kinds[1:]


# --- policies ----------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None, derandomize=True)
@given(anything | hard, chosen)
def test_any_choice_of_policies_is_idempotent_and_keeps_offsets(text, names):
    new, offsets = normalise_text(text, names)
    assert normalise_text(new, names)[0] == new
    assert len(offsets) == len(new)
    assert all(0 <= a < b <= len(text) for a, b in offsets)
    assert [a for a, _ in offsets] == sorted(a for a, _ in offsets)


@quick
@given(anything | hard)
def test_nfc_and_nfkc_are_those_of_unicode(text):
    for form in ("NFC", "NFKC"):
        assert normalise_text(text, form.lower())[0] == unicodedata.normalize(form, text)


@quick
@given(anything)
def test_no_policy_changes_nothing(text):
    assert normalise_text(text, ()) == (text, [(i, i + 1) for i in range(len(text))])


@pytest.mark.parametrize(
    ("policy", "text", "new"),
    [
        ("newline", "a\r\nb\rc\u2028d\x85", "a\nb\nc\nd\n"),
        ("control", "a\0b\x7f\tc\n\r\ud800", "ab\tc\n\r"),
        ("invisible", "a\u200bb\ufeff\u00ad\u202e c\u200dd 好\u200c的", "ab cd 好的"),
        (
            "invisible",
            "می\u200cخ 👩\u200d🚀 \u0915\u094d\u200d\u0937",
            "می\u200cخ 👩\u200d🚀 \u0915\u094d\u200d\u0937",
        ),
        ("invisible", "hi\U000e0068\U000e0069", "hi"),
        ("emoji_drop", "a👩\u200d🚀b👍🏽1\ufe0f\u20e3 🇫🇷™", "ab1 ™"),
        ("emoji_describe", "👍🇫🇷", ":thumbs_up_sign::flag_fr:"),
        ("width", "Ａ１％ｶﾞ，（）", "A1%ガ，（）"),
        ("nfkc", "x² ﬁ ™ ，", "x2 fi TM ,"),
        ("nfc", "e\u0301²", "é²"),
        ("case", "ÀΣẞ中", "àσß中"),
        ("urls", "见http://x.cn/a?b=1，HTTPS://Y.org/(z). ftp://q", "见[url]，[url]). [url]"),
        ("quotes", "“a” ‘b’ «c» 「d」", "\"a\" 'b' «c» 「d」"),
        ("dashes", "a–b—c\u2011d−1 ～", "a-b-c-d-1 ～"),
        ("spaces", "a\u00a0b\u3000c\td\n", "a b c\td\n"),
        ("squeeze", "a  b\t\tc\n    d", "a b c\n d"),
        ("digits", "a123 4.56", "a1 2 3 4.5 6"),
    ],
)
def test_each_policy_does_what_it_says(policy, text, new):
    assert normalise_text(text, policy)[0] == new
    assert POLICIES[policy].loses


def test_offsets_lead_a_label_back():
    text = "\ufeffＯｓｌｏ\u200b　e\u0301"
    new, offsets = normalise_text(text, ["invisible", "width", "nfc"])
    assert new == "Oslo é"
    assert offsets == [(1, 2), (2, 3), (3, 4), (4, 5), (6, 7), (7, 9)]


def test_squeeze_says_that_it_loses_indentation():
    assert "indentation" in POLICIES["squeeze"].loses
    assert "squeeze" not in SAFE and "case" not in SAFE and "nfkc" not in SAFE


# --- policies in a tokenizer -------------------------------------------------------------------

BUILT = [name for name in POLICIES if name not in ("emoji_describe", "digits")]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"llama"}))
def test_a_tokenizer_with_policies_is_the_tokenizer_of_the_rewritten_text(fast, family):
    tok = fast[family]
    copies = {names: with_policies(tok, names) for names in (tuple(BUILT), SAFE)}

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(anything | hard)
    def check(text):
        for names, copy in copies.items():
            new, offsets = normalise_text(text, names)
            ours = copy(text, add_special_tokens=False, return_offsets_mapping=True)
            theirs = tok(new, add_special_tokens=False, return_offsets_mapping=True)
            assert ours["input_ids"] == theirs["input_ids"]
            for (a, b), (c, d) in zip(
                ours["offset_mapping"], theirs["offset_mapping"], strict=True
            ):
                assert a == b or c == d or offsets[c][0] <= a < b <= offsets[d - 1][1]

    check()


def test_metaspace_that_depends_on_the_first_character_is_told(fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="normalise_text"):
            with_policies(fast["llama"])
        with_policies(fast["t5"])
    copy = with_policies(fast["llama"])
    for text in ("a\u200bb\u00a0c\r\n", "plain"):
        assert copy(text)["input_ids"] == fast["llama"](normalise_text(text)[0])["input_ids"]


def test_saving_keeps_the_policies_also_for_classes_that_rebuild_their_normaliser(fast, tmp_path):
    own = BertTokenizer(vocab=fast["bert"].get_vocab())
    copy = with_policies(own, ["width", "invisible", "digits"])
    copy.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(dict(model_type="bert")))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*TEXTS, "Ａ\u200bＢ 2024"]
    assert loaded(texts)["input_ids"] == copy(texts)["input_ids"]
    assert copy.tokenize("１２")[-2:] == ["1", "2"]
    assert own.tokenize("Ａ\u200bＢ") != copy.tokenize("Ａ\u200bＢ") or own.tokenize(
        "2024"
    ) != copy.tokenize("2024")


def test_the_given_tokenizer_is_not_changed_and_the_copy_keeps_its_settings(base, fast):
    before = base.backend_tokenizer.to_str()
    copy = with_policies(base)
    assert base.backend_tokenizer.to_str() == before
    assert (
        copy.chat_template == base.chat_template and copy.model_max_length == base.model_max_length
    )
    for tokenizer in (base, *fast.values()):
        copy = with_policies(tokenizer, ())
        assert copy.special_tokens_map == tokenizer.special_tokens_map
        assert sorted(copy.all_special_tokens) == sorted(tokenizer.all_special_tokens)
        assert copy.get_vocab() == tokenizer.get_vocab()
        assert copy(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        old, new = tokenizer.added_tokens_decoder, copy.added_tokens_decoder
        assert {i: (t.content, t.lstrip, t.special) for i, t in new.items()} == {
            i: (t.content, t.lstrip, t.special) for i, t in old.items()
        }
        assert len(copy) == len(tokenizer)
    assert with_policies(fast["bert"])("a", "b").keys() == fast["bert"]("a", "b").keys()


def test_a_policy_cannot_make_a_control_token_out_of_typed_text(base):
    end = base.convert_tokens_to_ids("<|im_end|>")
    copy = with_policies(base, BUILT)
    for typed in ("<|im_\u200bend|>", "＜｜ｉｍ＿ｅｎｄ｜＞", "<|IM_END|>"):
        assert end not in copy(typed)["input_ids"]
    assert end in copy("<|im_end|>")["input_ids"]
    mixed = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(base.backend_tokenizer.to_str())
    )
    mixed.add_special_tokens({"sep_token": AddedToken("<SEP>", special=True, normalized=True)})
    sep = mixed.convert_tokens_to_ids("<SEP>")
    assert (
        sep
        not in with_policies(mixed, ["width", "invisible", "case"])("<SE\u200bP> <sep>")[
            "input_ids"
        ]
    )


def test_policies_on_top_of_policies(fast):
    once = with_policies(fast["gpt"])
    assert with_policies(once)(TEXTS)["input_ids"] == once(TEXTS)["input_ids"]


# --- faults of the user ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda tok: normalise_text("a", "qotes"), "there is no 'qotes'"),
        (lambda tok: normalise_text("a", ["emoji_drop", "emoji_describe"]), "exclude each other"),
        (lambda tok: normalise_text(None), "NoneType"),
        (lambda tok: normalise_text("a", [1]), "there is no '1'"),
        (lambda tok: with_policies(tok, "emoji_describe"), "normalise_text"),
        (lambda tok: with_policies("gpt2"), "no fast tokenizer"),
        (lambda tok: explain_loss(tok, 3), "int"),
        (lambda tok: explain_loss(tok, "\ud83d"), "lone surrogate"),
        (lambda tok: survey({}), "there is none"),
        (lambda tok: survey(tok, {"g": [None]}), "NoneType"),
        (lambda tok: show_side_by_side(["a"], "gpt2"), "no fast tokenizer"),
    ],
)
def test_faults_are_told(fast, call, told):
    with pytest.raises(InputError, match=re.escape(told)):
        call(fast["gpt"])

"""Chat templates: what is trained is the answer and its end, and nobody's text becomes a control token."""

import re
from pathlib import Path

import pytest
import trl
from conftest import ROOT, SENTENCES, toy_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment.errors import InputError
from alignment.templates import ChatEncoder, TemplateRefusal, load_template, stop_ids

SHIPPED = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
OURS = sorted((ROOT / "data" / "chat_templates").glob("*.jinja"))
# Want content as a list of typed parts: text is refused, because it would be left out or crash.
MULTIMODAL = ("idefics3", "llava_next", "smolvlm")
# Prompt the model into a thinking block that the rows do not have: nothing is trained, and the run says so.
THINKING = ("deepseek", "nemotron_3")
CONTROL = r"<\|[\w▁]+\|>|<｜[^<>'\"]+｜>|<(?:start|end)_of_turn>|<end_of_utterance>|<\|turn>|<turn\|>|\[/?INST\]"
CHAT = [
    {"role": "user", "content": "Add seven"},
    {"role": "assistant", "content": "twelve cats"},
    {"role": "user", "content": "and five?"},
    {"role": "assistant", "content": "forty dogs"},
]


def encoder_of(template, bos=False):
    """An encoder on the toy tokenizer with a template and its control tokens."""
    tokenizer = toy_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted({*re.findall(CONTROL, template), "<|im_start|>"})}
    )
    tokenizer.chat_template = template
    return ChatEncoder(tokenizer)


def chatml():
    return ChatEncoder(toy_tokenizer())


def spaced_tokenizer(scheme="always"):
    """A tokenizer as Llama 2 has it: every text, and what follows a control token, begins with a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    letters = sorted({c for s in SENTENCES for c in s} | set("abcdefghijklmnopqrstuvwxyz:<>|_/[]"))
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=control + [f"<0x{i:02X}>" for i in range(256)],
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<unk>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def check_turns(encoder, messages, encoded):
    """Turns are in order, apart, and the mask is on exactly in them."""
    ends = [0]
    for start, end, _ in encoded.turns:
        assert ends[-1] <= start < end
        ends.append(end)
    inside = {i for start, end, _ in encoded.turns for i in range(start, end)}
    assert encoded.mask == [int(i in inside) for i in range(len(encoded.input_ids))]
    for (start, _, _), index in zip(encoded.turns, encoded.messages, strict=True):
        assert messages[index]["role"] == "assistant"
        assert encoded.input_ids[:start] == encoder.encode_prompt(messages[:index])


def test_templates_are_there():
    assert len(SHIPPED) > 40 and len(OURS) >= 2


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_template_trains_the_answer_and_its_end(path):
    encoder = encoder_of(path.read_text(encoding="utf-8"), bos=True)
    if path.stem.startswith(MULTIMODAL):
        with pytest.raises(TemplateRefusal):
            encoder.encode_chat(CHAT)
        return
    encoded = encoder.encode_chat(CHAT)
    assert len(encoded.turns) + encoded.skipped == 2
    if path.stem.startswith(THINKING):
        assert encoded.skipped == 2 and not any(encoded.mask)
        return
    check_turns(encoder, CHAT, encoded)
    assert 3 in encoded.messages  # the last answer is always what the model would have given
    for (start, end, _), index in zip(encoded.turns, encoded.messages, strict=True):
        before, answer, after = encoder.tokenizer.decode(encoded.input_ids[start:end]).partition(CHAT[index]["content"])
        assert answer
        words = encoder.special_pattern.sub("", before).replace("<think>", "").replace("</think>", "").strip()
        assert words in ("", "final", "to=user")  # the head of an answer that the model writes itself
        # a control token at the end, save where history drops it or the next speaker ends the turn
        assert encoder.special_pattern.sub("", after).strip() == ""
        assert after or path.stem.startswith(("gptoss", "glm4moe"))
    assert encoded.input_ids.count(encoder.tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("path", OURS, ids=lambda path: path.stem)
@pytest.mark.parametrize("bos", [False, True])
def test_our_templates_end_every_answer_with_a_stop_token(path, bos):
    encoder = encoder_of(path.read_text(encoding="utf-8"), bos)
    if "im_end" in path.read_text() and bos:
        encoder.stop_tokens.add("<|im_end|>")
    messages = [{"role": "system", "content": "Be brief."}, *CHAT]
    encoded = encoder.encode_chat(messages)
    check_turns(encoder, messages, encoded)
    ends = [encoder.tokenizer.decode(encoded.input_ids[a:b]) for a, b, _ in encoded.turns]
    stop = "</s>" if bos and path.stem == "plain" else "<|im_end|>"
    assert ends == [f"twelve cats{stop}", f"forty dogs{stop}"]
    assert [stopped for *_, stopped in encoded.turns] == [True, True]
    assert encoded.input_ids.count(encoder.tokenizer.bos_token_id) == int(bos and path.stem == "plain")
    # without contents that look like control tokens, a prompt is what anybody else's program makes of it
    prompt = encoder.tokenizer.apply_chat_template(messages[:2], add_generation_prompt=True)["input_ids"]
    assert encoder.encode_prompt(messages[:2]) == prompt


def test_history_that_a_template_rewrites_is_not_trained():
    """An answer that is shown otherwise once it is history is one that the model never gave."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [CHAT[0], {"role": "assistant", "content": "<less than you think>"}, *CHAT[2:]]
    encoder = encoder_of(template)
    encoded = encoder.encode_chat(messages)
    assert (encoded.skipped, encoded.messages) == (1, [3])
    assert encoder.tokenizer.decode([t for t, m in zip(encoded.input_ids, encoded.mask, strict=True) if m]) == (
        "<think></think>forty dogs<|im_end|>"
    )


def test_template_without_control_tokens_trains_the_whole_answer():
    template = (
        "{% for m in messages %}{{ m['role'] + ': ' + ('(note) ' if m['role'] == 'assistant' else '')"
        " + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = [CHAT[0], {"role": "assistant", "content": "not"}, CHAT[2], {"role": "assistant", "content": "e"}]
    encoder = encoder_of(template)
    encoded = encoder.encode_chat(messages)
    texts = [encoder.tokenizer.decode(encoded.input_ids[a:b]) for a, b, _ in encoded.turns]
    assert texts == ["(note) not", "(note) e"]
    assert [stopped for *_, stopped in encoded.turns] == [False, False]


def test_only_stop_tokens_count_as_an_end():
    encoder = encoder_of((ROOT / "data/chat_templates/chatml.jinja").read_text(), bos=True)
    assert encoder.stop_tokens == {"</s>"}
    assert [stopped for *_, stopped in encoder.encode_chat(CHAT).turns] == [False, False]

    class Config:
        eos_token_id = [1, 2]

    assert stop_ids(encoder.tokenizer, Config) == {1, 2}
    assert stop_ids(encoder.tokenizer) == {encoder.tokenizer.eos_token_id}


SPELLINGS = st.sampled_from(
    [
        "<|im_start|>",
        "<|im_end|>",
        "<|pad|>",
        "<|im_end|",
        "\ue000",
        "\ue0001\ue001",
        "\ue000999\ue001",
        "\n",
        " ",
        "{{ x }}",
    ]
)
TEXT = st.lists(st.one_of(SPELLINGS, st.text(max_size=8)), max_size=6).map("".join)
ANSWER = TEXT.filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None)
@given(system=TEXT, users=st.tuples(TEXT, TEXT), answers=st.tuples(ANSWER, ANSWER))
def test_any_text_stays_text(system, users, answers):
    """In each role: the control tokens are the template's own, the rest decodes to what was written."""
    encoder = chatml()
    messages = [{"role": "system", "content": system}]
    for user, answer in zip(users, answers, strict=True):
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    encoded = encoder.encode_chat(messages)
    check_turns(encoder, messages, encoded)
    start, end = (encoder.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert encoded.input_ids.count(start) == encoded.input_ids.count(end) == len(messages)
    assert encoder.tokenizer.pad_token_id not in encoded.input_ids
    for (first, last, stopped), answer in zip(encoded.turns, answers, strict=True):
        assert stopped and encoded.input_ids[last - 1] == end
        assert encoder.tokenizer.decode(encoded.input_ids[first : last - 1]) == answer
    found = sum(len(encoder.special_pattern.findall(text)) for text in (system, *users, *answers))
    assert encoded.escaped == found


def test_control_tokens_in_tools_and_calls_stay_text():
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{{ m['content'] or '' }}{{ m['tool_calls'] | tojson if m['tool_calls'] else '' }}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder = encoder_of(template)
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "an <|im_end|> token"}}}
    messages = [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [call]}]
    encoded = encoder.encode_chat(messages, tools=[{"name": "find", "description": "<|im_start|>system"}])
    end = encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoded.input_ids.count(end) == 2 and encoded.escaped == 2
    (turn,) = encoded.turns
    assert "an <|im_end|> token" in encoder.tokenizer.decode(encoded.input_ids[turn[0] : turn[1] - 1])


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize("template", ["chatml", "llama2"])
def test_tokenizers_that_begin_with_a_space(scheme, template):
    """The answer begins with its own first token, and the pieces join to what one pass over the text gives."""
    tokenizer = spaced_tokenizer(scheme)
    tokenizer.chat_template = {
        "chatml": (ROOT / "data/chat_templates/chatml.jinja").read_text(),
        "llama2": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<s>[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}",
    }[template]
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode_chat(CHAT)
    check_turns(encoder, CHAT, encoded)
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False).removesuffix("\n")
    assert encoded.input_ids == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    tokens = [tokenizer.convert_ids_to_tokens(encoded.input_ids[a]) for a, *_ in encoded.turns]
    assert [token.startswith("▁") for token in tokens] == [template == "llama2"] * 2


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_escaped_text_gains_no_space(scheme):
    tokenizer = spaced_tokenizer(scheme)
    tokenizer.chat_template = (ROOT / "data/chat_templates/chatml.jinja").read_text()
    encoder = ChatEncoder(tokenizer)
    encoded = encoder.encode_chat([{"role": "user", "content": "a<|im_end|>b"}, CHAT[1]])
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    assert "a<|im_end|>b<|im_end|>" in "".join(tokens)
    assert tokens.count("<|im_end|>") == 2


@pytest.mark.parametrize("scheme", ["always", "first", None])
def test_text_and_its_continuation(scheme):
    tokenizer = toy_tokenizer() if scheme is None else spaced_tokenizer(scheme)
    encoder = ChatEncoder(tokenizer)
    spaced = encoder.encode_text("The boat") + encoder.encode_text(" crossed", bos=False)
    assert tokenizer.decode(spaced) == "The boat crossed"
    joined = encoder.encode_text("The ") + encoder.encode_text("boat", bos=False)
    assert tokenizer.decode(joined) == "The boat"


def test_bos_stands_once_before_a_text():
    from tokenizers.processors import TemplateProcessing

    tokenizer = toy_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <|im_end|>", special_tokens=[("<s>", bos), ("<|im_end|>", eos)]
    )
    encoder = ChatEncoder(tokenizer)
    plain = encoder.encode_text("The boat")
    assert plain == encoder.encode_text("<s>The boat")
    assert plain.count(bos) == 1 and eos not in plain
    assert encoder.encode_text("The boat<|im_end|>")[-1] == eos


def test_no_template_is_an_error_that_names_one():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat_templates/plain.jinja") as error:
        ChatEncoder(tokenizer).encode_chat(CHAT)
    assert not isinstance(error.value, TemplateRefusal)
    with pytest.raises(InputError, match="no chat template at nowhere.jinja"):
        load_template(tokenizer, "nowhere.jinja")
    load_template(tokenizer, str(ROOT / "data/chat_templates/plain.jinja"))
    assert ChatEncoder(tokenizer).encode_chat(CHAT).turns


def test_a_template_that_refuses_names_the_roles():
    template = (
        "{% for m in messages %}{% if not loop.first and m['role'] == 'user' %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(TemplateRefusal, match="roles user, user: roles must alternate"):
        encoder_of(template).encode_prompt([CHAT[0], CHAT[0]])
    with pytest.raises(TemplateRefusal, match="refuses"):  # Python's own errors inside a template
        encoder_of("{% for m in messages %}{{ m['role'] + m['nothing'] + 1 }}{% endfor %}").encode_prompt(CHAT[:1])


def test_template_arguments_reach_the_template():
    template = (
        "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt and not enable_thinking %}{{ 'quick ' }}{% endif %}"
    )
    encoder = encoder_of(template)
    assert encoder.with_kwargs({}) is encoder
    short = encoder.with_kwargs({"enable_thinking": True}).encode_prompt(CHAT[:1])
    assert encoder.tokenizer.decode(encoder.encode_prompt(CHAT[:1])) == encoder.tokenizer.decode(short) + "quick "

"""The one place where text becomes token ids and back: tokenizer, chat template, end of a response.

Two rules keep the rest of the system honest. A prompt and its response, encoded apart, are exactly the ids of the whole
conversation, so that what was trained on is what is sampled later. And sampled ids are never made into text and back.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from protocol.records import DemonstrationRecord, Text

Message = dict[str, str]
"""One turn of a conversation: `role` (system, user or assistant) and `content`."""

PAD, END, USER, ASSISTANT, SYSTEM, UNKNOWN = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|unknown|>",
)
SPECIAL_TOKENS = (PAD, END, USER, ASSISTANT, SYSTEM, UNKNOWN)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Stands in where a response is encoded without its prompt.
_PROBE: list[Message] = [{"role": "user", "content": "hello"}]


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, context_tokens: int) -> "PreTrainedTokenizerFast":
    """Train a byte-level BPE tokenizer with a chat template, the same one for the same texts.

    The alphabet is printable ASCII and whatever bytes the texts hold; another byte becomes `<|unknown|>`, visibly,
    because a full alphabet would fill half of a vocabulary as small as the quickstart's.

    Args:
        texts: What the tokenizer is to write compactly.
        vocab_size: Number of tokens, special ones included.
        context_tokens: The longest sequence of the model that will use it.

    Raises:
        UserError: The vocabulary has no room for the alphabet, or the texts are too few to fill it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    printable = "".join(chr(code) for code in range(ord(" "), 127)) + "\n"
    alphabet = sorted({letter for piece, _ in split.pre_tokenize_str(printable) for letter in piece})
    bpe = Tokenizer(models.BPE(unk_token=UNKNOWN))
    bpe.pre_tokenizer = split
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() != vocab_size:
        raise UserError(
            f"the texts give a vocabulary of {bpe.get_vocab_size()} tokens, not {vocab_size}",
            cause="too few different words to merge, or no room for the alphabet",
            next_step=f"set vocab_size to {bpe.get_vocab_size()} or give more varied texts",
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        model_max_length=context_tokens,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def tokenizer_from(
    records: "Iterable[DemonstrationRecord]", *, vocab_size: int, context_tokens: int
) -> "PreTrainedTokenizerFast":
    """Train the tokenizer of a policy from scratch on what is said in its demonstrations.

    Args:
        records: The demonstrations.
        vocab_size: As in `train_tokenizer`.
        context_tokens: Likewise.

    Returns:
        The tokenizer, the same for the same demonstrations.
    """
    texts = (text for record in records for part in (record.prompt, record.completion) for text in _said(part))
    return train_tokenizer(texts, vocab_size=vocab_size, context_tokens=context_tokens)


def _said(text: "Text") -> list[str]:
    return [text] if isinstance(text, str) else [message["content"] for message in text]


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model directory or a hub id, running no code that comes with it.

    Raises:
        UserError: There is none, or it has no end token.
    """
    from transformers import AutoTokenizer

    directory = Path(path)
    if directory.is_dir() and not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise UserError(
            "the directory holds no tokenizer",
            where=str(path),
            cause=f"none of {', '.join(_TOKENIZER_FILES)} is there",
            next_step="save the tokenizer beside the model with tokenizer.save_pretrained(DIR)",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            "the tokenizer can not be loaded",
            where=str(path),
            cause=str(error),
            next_step="check the path or hub id; tokenizers that need their own code are refused on purpose",
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token, so no response could ever end",
            where=str(path),
            next_step="set eos_token in its tokenizer_config.json",
        )
    return tokenizer


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")


def context_tokens(path: str | Path) -> int:
    """Return the longest sequence that a model takes, prompt and response together.

    Args:
        path: The model's directory or hub id.

    Raises:
        UserError: If there is no model, or it does not say.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    except (OSError, ValueError) as error:
        raise UserError(f"no model can be read there: {error}", where=str(path)) from None
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise UserError("the model's config.json does not say how long a sequence may be", where=str(path))
    return found


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: str | Sequence[Message]) -> list[int]:
    """Encode a prompt up to the place where the response begins.

    A conversation goes through the chat template with its generation prompt, a string is encoded as it is. The start
    token appears at most once, whoever adds it, and an end token that the tokenizer would append is left out.
    """
    if not isinstance(prompt, str):
        return _apply_template(tokenizer, prompt, generation_prompt=True)
    ids = list(tokenizer.encode(prompt))
    plain = list(tokenizer.encode(prompt, add_special_tokens=False))
    if ids and ids[-1] == tokenizer.eos_token_id and plain[-1:] != ids[-1:]:
        ids.pop()
    return _without_double_start(tokenizer, ids)


def encode_response(
    tokenizer: "PreTrainedTokenizerBase",
    completion: str | Sequence[Message],
    *,
    prompt: Sequence[Message] | None = None,
) -> list[int]:
    """Encode a response including its end token.

    For a conversation, `encode_prompt(prompt) + encode_response(completion, prompt=prompt)` is the chat template
    applied to the whole (up to the end token: what some templates write after it is not the response's).

    Args:
        tokenizer: The tokenizer.
        completion: The text, or the conversation's last turn as a list of one assistant message.
        prompt: The conversation so far; a stand-in is used without it.

    Raises:
        UserError: The template rewrites earlier turns when a turn is added, or ends turns with another token than the
            tokenizer's end token.
    """
    if isinstance(completion, str):
        return [*tokenizer.encode(completion, add_special_tokens=False), _end_id(tokenizer)]
    before = list(_PROBE if prompt is None else prompt)
    prefix = _apply_template(tokenizer, before, generation_prompt=True)
    whole = _apply_template(tokenizer, [*before, *completion], generation_prompt=False)
    if whole[: len(prefix)] != prefix:
        raise UserError(
            "the chat template writes a conversation differently once the response is added",
            where=_name_of(tokenizer),
            cause="it drops, adds or rewrites text before the last turn (reasoning models' templates often do)",
            next_step="use a chat template whose generation prompt is a prefix of the finished conversation",
        )
    response = whole[len(prefix) :]
    end = _end_id(tokenizer)
    if end not in response:
        raise UserError(
            f"the chat template does not end a response with the tokenizer's end token {tokenizer.eos_token!r}",
            where=_name_of(tokenizer),
            cause="a base model's end token with a chat model's template",
            next_step="set eos_token to the token with which the template ends an assistant turn",
        )
    last = len(response) - 1 - response[::-1].index(end)
    return response[: last + 1]


def decode(tokenizer: "PreTrainedTokenizerBase", token_ids: Sequence[int]) -> str:
    """Return the text of token ids for people and for reward functions, without special tokens."""
    return str(tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=True))


def tokenizer_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Hash what decides between text and ids: vocabulary, rules, special tokens and chat template.

    It survives saving and loading, and does not see settings that calls leave behind (padding, truncation).
    """
    facts: dict[str, Any] = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "chat_template": tokenizer.chat_template,
    }
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        facts["rules"] = {name: rules[name] for name in sorted(rules) if name not in ("padding", "truncation")}
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _apply_template(
    tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message], *, generation_prompt: bool
) -> list[int]:
    if tokenizer.chat_template is None:
        raise UserError(
            "the data are conversations but the tokenizer has no chat template",
            where=_name_of(tokenizer),
            next_step="use plain strings as prompts, or a tokenizer with a chat template",
        )
    # The library that runs the templates; whoever encodes plain text never needs it.
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation_prompt)
    except TemplateError as error:
        raise UserError(
            f"the chat template refuses the conversation: {error}",
            where=_name_of(tokenizer),
            cause=f"its turns are {', '.join(message['role'] for message in messages)}",
            next_step="bring the turns into the order that this model knows, or leave the row out",
        ) from error
    ids = list(tokenizer.encode(str(text), add_special_tokens=False))
    return _without_double_start(tokenizer, ids)


def _without_double_start(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def _end_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise UserError("the tokenizer has no end token", where=_name_of(tokenizer), next_step="set its eos_token")
    return end


def _name_of(tokenizer: "PreTrainedTokenizerBase") -> str:
    return f"tokenizer {tokenizer.name_or_path}" if tokenizer.name_or_path else "tokenizer"

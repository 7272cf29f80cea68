"""A checkpoint's tokenizer: text to token ids and back, chats to prompts."""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, overload

from engine import chat, control_tokens
from engine.config import ChatOptions
from engine.errors import CheckpointError, RequestError, shown
from engine.templates import literal_text
from engine.tokenizer_files import Resolved, panicked, reason, resolve

LIKELY_CHARACTERS = 16  # of a token at most, in nearly every text
_AT_ONCE = 1 << 18  # characters
_AS_TRANSFORMERS = ChatOptions()


class TokenText(NamedTuple):
    """One token as text, as logprobs show it: "" for a part of a character; its bytes say which."""

    text: str
    bytes: bytes


class Tokenizer:
    """Encodes, decodes and renders chats as transformers' tokenizer of the same checkpoint does.

    One thing is left out: ``clean_up_tokenization_spaces``, which for BPE transformers leaves out
    too, and which would change text that a stream has already shown.

    special_tokens: "bos_token" and so on, to the token. chat_templates: by name ("default").
    response_template: what an answer has in it, as transformers is told; None if nothing says.
    vocab_size: one more than the largest token id. chat_options: how chats become prompts.
    renderer: what runs the templates.
    """

    renderer: Callable[..., str] = staticmethod(chat.render)

    def __init__(self, resolved: Resolved, chat_options: ChatOptions = _AS_TRANSFORMERS) -> None:
        self.chat_options = chat_options
        self.backend = backend = resolved.backend
        self.special_tokens = resolved.special_tokens
        self.chat_templates = resolved.chat_templates
        self.response_template = resolved.response_template
        specials = [*self.special_tokens.values(), *resolved.extra_special_tokens]
        ids = [backend.token_to_id(token) for token in dict.fromkeys(specials)]
        self.all_special_ids = [i for i in ids if i is not None]
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.vocab_size = backend.size

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        revision: str | None = None,
        chat_options: ChatOptions = _AS_TRANSFORMERS,
    ) -> "Tokenizer":
        """The tokenizer of a checkpoint folder or of a Hugging Face hub id (at a revision).

        Raises CheckpointError if there is none, or it cannot be read.
        """
        try:
            return cls(resolve(path_or_id, revision), chat_options)
        except BaseException as error:  # tokenizers raises plain Exception, transformers anything
            if not isinstance(error, Exception) and not panicked(error):
                raise
            message = f"cannot load a tokenizer from {str(path_or_id)!r}: {reason(error)}"
            raise CheckpointError(message) from error

    @overload
    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    @overload
    def encode(self, text: list[str], add_special_tokens: bool = True) -> list[list[int]]: ...

    def encode(
        self, text: str | list[str], add_special_tokens: bool = True
    ) -> list[int] | list[list[int]]:
        """The token ids of a text, or of each of several (encoded in parallel)."""
        texts = [text] if isinstance(text, str) else text
        for one in texts:
            if not isinstance(one, str):
                raise RequestError(f"a prompt must be a string or token ids, got {shown(one)}")
            try:
                one.encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"a prompt must be valid Unicode: {error}") from None
        ids: list[list[int]] = []
        begun = size = 0
        for number, one in enumerate(texts):  # a few at a time: it takes 400 bytes a character
            size += len(one)
            if size >= _AT_ONCE or number == len(texts) - 1:
                ids += self._encode(texts[begun : number + 1], add_special_tokens)
                begun, size = number + 1, 0
        return ids[0] if isinstance(text, str) else ids

    def _encode(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        try:
            return self.backend.encode(texts, add_special_tokens)
        except BaseException as error:
            if not panicked(error):
                raise
            raise RequestError(f"prompt: the tokenizer gives up on this text: {error}") from None

    @cached_property
    def longest_token(self) -> int:
        """The characters of the longest token as the vocabulary writes it."""
        return max((len(self.id_to_piece(i) or "") for i in range(self.vocab_size)), default=1)

    def surely_longer(self, text: str, most: int) -> bool:
        """Whether a text has more than ``most`` tokens, as far as can be said at a cost that
        ``most`` bounds and not the text: it has too many characters, or already its beginning has
        twice as many tokens."""
        # Without bytes for what the vocabulary lacks one token may stand for any length of text.
        spelt = self.backend.byte_decoder is not None
        if spelt and len(text) > most * self.longest_token:
            return True
        head = most * LIKELY_CHARACTERS
        return len(text) > head and len(self.encode(text[:head], False)) > 2 * most

    def decode(
        self,
        ids: Sequence[int],
        skip_special_tokens: bool = False,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids; ids that the vocabulary lacks have none.

        spaces_between_special_tokens: False leaves out the spaces that some decoders (WordPiece)
        put between two added tokens.
        """
        if skip_special_tokens or spaces_between_special_tokens:
            return self.backend.decode(list(ids), skip_special_tokens)
        added = self.backend.added_ids
        runs: list[list[int]] = []
        for token_id in ids:
            if runs and not (token_id in added and runs[-1][-1] in added):
                runs[-1].append(token_id)
            else:
                runs.append([token_id])
        return "".join(self.backend.decode(run, skip_special_tokens=False) for run in runs)

    def id_to_piece(self, token_id: int) -> str | None:
        """The token as the vocabulary writes it, or None for an id that it lacks."""
        return self.backend.id_to_token(token_id)

    def token_texts(self, ids: Sequence[int], context: Sequence[int] = ()) -> list[TokenText]:
        """Each of ``ids`` as the token that could follow the token ids ``context``.

        A token that ends a character begun in the context shows the whole character, as in vLLM.
        """
        byte_decoder = self.backend.byte_decoder
        if byte_decoder is not None:
            begun, _ = byte_decoder.unfinished(context, byte_decoder.all)
            pieces = [byte_decoder.all[i] for i in ids]
            return [TokenText(byte_decoder.text(begun + piece)[0], piece) for piece in pieces]
        before = list(context[-8:])
        skip = len(self.decode(before))
        texts = [self.decode([*before, token_id])[skip:] for token_id in ids]
        return [TokenText(text, text.encode()) for text in texts]

    def bad_words_ids(self, words: Sequence[str] | None) -> list[list[int]]:
        """The token sequences that must not be completed, for ``SamplingParams.bad_words``.

        Each word at the start of a text and after a space, as in vLLM; but where vLLM leaves out
        the second if it takes another number of tokens, here it is kept.
        """
        sequences: list[list[int]] = []
        for word in words or ():
            bare = self.encode(word.lstrip(), add_special_tokens=False)
            if not bare:
                raise RequestError(f"bad_words has {word!r}, which is no token at all")
            spaced = self.encode(" " + word.lstrip(), add_special_tokens=False)
            sequences.append(bare)
            if spaced[-len(bare) :] != bare:  # else banning the bare form bans it already
                sequences.append(spaced)
        return sequences

    def chat_template(self, asked: str | None, with_tools: bool) -> str | None:
        """The template that ``render_chat`` takes; None if there is none."""
        name = asked or ("tool_use" if with_tools and "tool_use" in self.chat_templates else "")
        return self.chat_templates.get(name or "default", asked)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt of OpenAI-style messages, for ``encode_chat``: control tokens that users wrote
        are marked in it if ``chat_options`` say that they shall be ordinary text.

        chat_template: the name of one of the checkpoint's, or a template itself (see
            ``chat.load_template`` for one in a file); the checkpoint's default by default.
        add_generation_prompt: end with the header of the assistant's answer.
        continue_final_message: leave the last message open, for the model to go on with.
        tools: what the model may call, as JSON schemas. template_kwargs: for the template.

        Raises RequestError for wrong messages, for what the template refuses or has no use for,
        and if there is no template.
        """
        template = self.chat_template(chat_template, bool(tools))
        if template is None:
            raise RequestError(
                "the checkpoint has no chat template: give one with chat_template"
                f" (--chat-template){self._names()}"
            )
        if template is chat_template and "{" not in template:
            raise RequestError(f"chat_template must be a template, got {template!r}{self._names()}")
        if self.chat_options.sanitize_control_tokens:
            names = self._control_tokens(template)
            messages, tools, template_kwargs = (
                control_tokens.marked(value, names) for value in (messages, tools, template_kwargs)
            )
        return self.renderer(
            template,
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            special_tokens=self.special_tokens,
            template_kwargs=template_kwargs,
            content_format=self.chat_options.content_format,
        )

    def _control_tokens(self, template: str) -> list[str]:
        """Special tokens, and added ones that the template writes; as in transformers."""
        written = literal_text(template)
        return [
            token
            for token, special in self.backend.added_tokens.items()
            if special or (token in written and not token.isspace())
        ]

    def encode_chat(self, text: str, add_special_tokens: bool = False) -> tuple[str, list[int]]:
        """What ``render_chat`` gave, as it is shown and as token ids.

        It holds special tokens of its own, so that no begin token is added unless
        ``add_special_tokens``. Raises RequestError for a control token that a user wrote and that
        cannot be ordinary text in this tokenizer.
        """
        if not self.chat_options.sanitize_control_tokens:
            return text, self.encode(text, add_special_tokens)
        backend = self.backend
        begin = self.encode("") if add_special_tokens else []
        ids = control_tokens.encoded(
            control_tokens.pieces(text, backend.added_tokens),
            lambda piece: self.encode(piece, add_special_tokens=False),
            backend.encode_plain,
            backend.token_to_id,
        )
        return control_tokens.unmarked(text), begin + ids

    def _names(self) -> str:
        names = sorted(self.chat_templates)
        return f", or the name of one of its own: {names}" if names else ""

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        chat_template: str | None = None,
        **options: Any,
    ) -> list[int]:
        """The token ids of ``render_chat`` with the same arguments."""
        _, ids = self.encode_chat(self.render_chat(messages, chat_template, **options))
        return ids

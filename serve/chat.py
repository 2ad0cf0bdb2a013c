"""From a conversation to token ids, through the chat template the model was trained with.

The template is the tokenizer's own Jinja (sandboxed by transformers), or the file given with `--chat-template`. There
is no fallback template: a wrong one makes every answer quietly worse, so a model without one is an error that says
what to do.
"""

from typing import Any

import jinja2

from .openai_types import ChatRequest, RequestError


def render(tokenizer: Any, chat: ChatRequest, template: str | None = None) -> str:
    """The prompt text of `chat`. RequestError if there is no template, or the template refuses the messages."""
    if template is None and not tokenizer.chat_template:
        raise RequestError(
            "this model's tokenizer has no chat template: start with --chat-template FILE.jinja, "
            "or use a plain prompt (/v1/completions, `bitsmith generate`)",
            "messages",
        )
    try:
        text = tokenizer.apply_chat_template(
            chat.messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=chat.add_generation_prompt,
            continue_final_message=chat.continue_final_message,
            **chat.template_kwargs,
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise RequestError(f"the chat template cannot render these messages: {error}", "messages") from error
    return str(text)


def chat_prompt_ids(tokenizer: Any, chat: ChatRequest, template: str | None = None) -> list[int]:
    """Token ids of `chat`. The template writes the special tokens itself, so the tokenizer adds none."""
    return list(tokenizer.encode(render(tokenizer, chat, template), add_special_tokens=False))

"""Chat templates: of models, and built-in ones by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from modelfuse.checkpoints import read_json
from modelfuse.checkpoints.vocabulary.tokenizers import TOKENIZER_CONFIG
from modelfuse.errors import RecipeError
from modelfuse.storage import PathOrUrl, is_file
from modelfuse.storage.files import read_whole

TEMPLATE_FILE = "chat_template.jinja"
#: Selects the most frequent template among the models.
AUTO = "auto"
#: Shorter texts are taken for misspelled names.
SHORTEST = 20

_TURNS = "{%- for message in messages -%}"
_SYSTEM = "{%- if message['role'] == 'system' -%}"
_USER = "{%- elif message['role'] == 'user' -%}"
_MODEL = "{%- elif message['role'] == 'assistant' -%}"
_END = "{%- endif -%}{%- endfor -%}"
_PROMPT = "{%- if add_generation_prompt -%}"

#: Templates by name, as the models of that name are prompted.
TEMPLATES: Mapping[str, str] = {
    "alpaca": (
        _TURNS + _SYSTEM + "{{ message['content'] + '\n\n' }}"
        + _USER + "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        + _MODEL + "{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}"
        + _END + _PROMPT + "{{ '### Response:\n' }}{%- endif -%}"
    ),
    "chatml": (
        _TURNS + "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
        + "{%- endfor -%}" + _PROMPT + "{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    ),
    "exaone": (
        _TURNS + _SYSTEM + "{{ '[|system|]' + message['content'] + '[|endofturn|]\n' }}"
        + _USER + "{{ '[|user|]' + message['content'] + '\n' }}"
        + _MODEL + "{{ '[|assistant|]' + message['content'] + '[|endofturn|]\n' }}"
        + _END + _PROMPT + "{{ '[|assistant|]' }}{%- endif -%}"
    ),
    "llama3": (
        "{{ bos_token }}" + _TURNS
        + "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim"
        + " + '<|eot_id|>' }}{%- endfor -%}"
        + _PROMPT + "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif -%}"
    ),
    "mistral": (
        "{{ bos_token }}" + _TURNS + _SYSTEM + "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        + _USER + "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        + _MODEL + "{{ ' ' + message['content'] + eos_token }}" + _END
    ),
}  # fmt: skip


def template_of(wanted: str, folders: Sequence[PathOrUrl]) -> str | None:
    """The text of a chat template.

    Args:
        wanted: ``auto``, a name, or the text.
        folders: The models' folders, in order.

    Returns:
        The text; None if ``auto`` finds none.

    Raises:
        RecipeError: If it is none of these.
    """
    if wanted == AUTO:
        found = Counter(text for text in map(template_in, folders) if text is not None)
        return found.most_common(1)[0][0] if found else None  # The first of equally frequent ones.
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted or len(wanted) < SHORTEST:
        raise RecipeError(
            f"chat_template is {wanted!r}, which is no name of a template and no template",
            f"Give {AUTO}, {', '.join(TEMPLATES)}, or a template's text.",
        )
    return wanted


def template_in(folder: PathOrUrl) -> str | None:
    """The chat template in a model's folder."""
    if is_file(folder / TEMPLATE_FILE):
        return read_whole(folder / TEMPLATE_FILE).decode("utf-8", "replace")
    if not is_file(folder / TOKENIZER_CONFIG):
        return None
    found = read_json(folder / TOKENIZER_CONFIG).get("chat_template")
    if isinstance(found, list):  # Several by name.
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None

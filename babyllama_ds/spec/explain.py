"""Pydantic's errors, worded for the person who wrote the file.

Enters: a `ValidationError` with the `Document` that was validated. Leaves: problems noted in
the document, each at the key's own line, with what was got, what was expected, and a hint.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from babyllama_ds.spec.base import MismatchError
from babyllama_ds.spec.document import CoreResolver, Document, KeyPath, key_text, show

# What people who know transformers and DeepSpeed write, and what it is called here.
OTHER_NAMES: Mapping[str, str] = {
    "batch_size": "batch_windows",
    "clip": "clip_norm",
    "eps": "epsilon",
    "gradient_clipping": "clip_norm",
    "lr": "learning_rate",
    "max_grad_norm": "clip_norm",
    "max_position_embeddings": "max_positions",
    "micro_batch_size": "micro_batch",
    "n_embd": "hidden_size",
    "n_head": "num_heads",
    "n_layer": "num_layers",
    "n_positions": "max_positions",
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "num_key_value_heads": "num_kv_heads",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "micro_batch",
    "rms_norm_eps": "norm_epsilon",
    "layer_norm_eps": "norm_epsilon",
    "layer_norm_epsilon": "norm_epsilon",
    "sequence_length": "length",
    "seq_length": "length",
    "tie_word_embeddings": "tied_embeddings",
    "train_micro_batch_size_per_gpu": "micro_batch",
    "type": "kind",
    "warmup": "warmup_steps",
}


OTHER_WORDS: Mapping[str, str] = {"gpu": "cuda"}
"""Likewise of values; `cpu`, which is nearer, would be the contrary."""


@dataclass(frozen=True)
class Located:
    """A key path, the model that has its last key, and what may stand there."""

    path: KeyPath
    owner: type[BaseModel] | None
    annotation: Any


def explain(
    error: ValidationError,
    root: type[BaseModel],
    document: Document,
    refused: Mapping[str, str] | None = None,
) -> None:
    """Note every error of a validation in the document.

    `refused` maps key paths that exist but may not be set here to the reason, which becomes
    the hint. Paths that already have a problem get no second one.
    """
    settled = {one.path for one in document.found}
    for details in error.errors(include_url=False):
        at = locate(root, document.data, details["loc"])
        if at.path in settled or _echoes_its_items(details):
            continue
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, MismatchError):
            for one in cause.mismatches:
                path = (*at.path, *one.key)
                document.complain(path, got=one.got, expected=one.expected, hint=one.hint)
        elif details["type"] == "extra_forbidden":
            _unknown_key(document, at, details["input"], refused or {})
        elif details["type"].startswith("union_tag"):
            _wrong_kind(document, at, details["input"])
        else:
            _wrong_value(document, at, details)
            settled.add(at.path)  # a union tells of each of its members


def locate(root: type[BaseModel], data: object, loc: Iterable[str | int]) -> Located:
    """Where Pydantic's `loc` is in what the user wrote.

    `loc` holds the tags of discriminated unions ("llama") between the keys; a tag is known by
    standing where the annotation has several models, or by being the model's own name.
    """
    path: KeyPath = ()
    annotation: Any = root
    value: Any = data
    owner: type[BaseModel] | None = None
    tag_read = False
    for key in loc:
        if isinstance(key, int) and isinstance(value, list):
            value = value[key] if key < len(value) else None
            path = (*path, key)
        elif not isinstance(value, Mapping):
            break  # a member of an untagged union, such as "int"
        elif not tag_read and _is_tag(key, _models_in(annotation)):
            tag_read = True
        else:
            owner = _model_of(_models_in(annotation), value)
            known = owner.model_fields.get(str(key)) if owner else None
            annotation = known.annotation if known else None
            value = value.get(str(key))
            path = (*path, key)
            tag_read = False
    return Located(path, owner, annotation)


def did_you_mean(word: object, known: Iterable[str]) -> str | None:
    """A hint for a misspelt word: the closest known one, or all there are."""
    known = sorted(set(known))
    near = closest(word, known)
    if near is not None:
        return f"did you mean `{near}`?"
    return f"there are: {', '.join(known)}" if known else None


def closest(word: object, known: Iterable[str]) -> str | None:
    """The known word that a misspelt one was meant to be, whatever its case; none: no one knows."""
    by_lower = {one.lower(): one for one in sorted(set(known), reverse=True)}
    other = OTHER_WORDS.get(str(word).lower())
    if other in by_lower:
        return by_lower[other]
    close = difflib.get_close_matches(str(word).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models inside `Annotated`, unions, optionals and tuples."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _words_in(annotation: Any) -> Iterator[str]:
    """The literal texts that a value may be, inside `Annotated`, unions and optionals."""
    if get_origin(annotation) is Literal:
        yield from (word for word in get_args(annotation) if isinstance(word, str))
    elif get_origin(annotation) is not tuple:
        for argument in get_args(annotation):
            yield from _words_in(argument)


def _is_tag(key: str | int, models: list[type[BaseModel]]) -> bool:
    return len(models) > 1 or key in {model.__name__ for model in models}


def _model_of(models: list[type[BaseModel]], value: Mapping[str, Any]) -> type[BaseModel] | None:
    """The one model, or the one whose `kind` the mapping names."""
    if len(models) == 1:
        return models[0]
    return next((model for model in models if value.get("kind") == _kind(model)), None)


def _kind(model: type[BaseModel]) -> str:
    return str(get_args(model.model_fields["kind"].annotation)[0])


def _echoes_its_items(details: ErrorDetails) -> bool:
    """Whether a list is "too short" only because its items, reported themselves, were wrong."""
    least = details.get("ctx", {}).get("min_length", 0)
    return details["type"] == "too_short" and len(details["input"]) >= least


def _unknown_key(
    document: Document, at: Located, value: object, refused: Mapping[str, str]
) -> None:
    key, parent = str(at.path[-1]), key_text(at.path[:-1])
    reason = refused.get(key_text(at.path))
    if reason:
        document.complain(at.path, got=show(value), expected="no such key here", hint=reason)
        return
    known = set(at.owner.model_fields) if at.owner else set()
    here = f"{parent}." if parent else ""
    elsewhere = {
        name.removeprefix(here): why for name, why in refused.items() if _below(name, here)
    }
    hint = did_you_mean(key, known)
    near = closest(key, [*known, *elsewhere])
    if OTHER_NAMES.get(key) in known:
        hint = f"it is called `{OTHER_NAMES[key]}` here"
    elif near is not None and near in elsewhere:
        hint = f"did you mean `{near}`? {elsewhere[near]}"
    document.complain(at.path, got="an unknown key", expected="a known one", hint=hint)


def _below(name: str, prefix: str) -> bool:
    """Whether a key path is one of the keys right below `prefix`."""
    return name.startswith(prefix) and "." not in name.removeprefix(prefix)


def _wrong_kind(document: Document, at: Located, value: Mapping[str, Any]) -> None:
    """A union's `kind` is missing or none of those there are."""
    kinds = [_kind(model) for model in _models_in(at.annotation)]
    expected = f"one of {', '.join(map(repr, kinds))}"
    path = (*at.path, "kind")
    if "kind" not in value:
        meant = next((key for key in value if OTHER_NAMES.get(key) == "kind"), None)
        meant = meant or closest("kind", value)
        hint = f"`{meant}` is called `kind` here" if meant else None
        document.complain(path, got="nothing", expected=expected, hint=hint)
        return
    got = value["kind"]
    document.complain(path, got=show(got), expected=expected, hint=did_you_mean(got, kinds))


def _wrong_value(document: Document, at: Located, details: ErrorDetails) -> None:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    field = at.owner.model_fields.get(str(at.path[-1])) if at.owner and at.path else None
    got = "nothing" if kind == "missing" else show(value)
    expected = _expected(kind, context, details["msg"])
    words = list(_words_in(at.annotation)) if kind not in ("literal_error", "missing") else []
    if words:
        expected += f", or {' or '.join(map(repr, words))}"
    if type(None) in get_args(at.annotation):
        expected += ", or null"
    near = closest(value, words) if isinstance(value, str) else None
    hint = f"did you mean `{near}`?" if near else _hint(kind, value, context)
    hint = hint or _as_a_kind(value, _models_in(at.annotation))
    if at.annotation == tuple[str, ...] and isinstance(value, str):
        hint = f"write [{json.dumps(value, ensure_ascii=False)}]"
    hint = hint or (field.description if field else None)
    document.complain(at.path, got=got, expected=expected, hint=hint)


_TYPES = {
    "missing": "a value",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
}


def _expected(kind: str, context: Mapping[str, Any], message: str) -> str:
    if kind in _TYPES:
        return _TYPES[kind]
    for name, sign in (("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
        if name in context:
            bound = context[name]
            return f"a number {sign} {int(bound) if bound == int(bound) else bound}"
    if kind == "literal_error":
        return f"one of {context['expected'].replace(' or ', ', ')}"
    if kind in ("too_short", "too_long"):
        least, most = context.get("min_length"), context.get("max_length")
        bound = f"at least {least}" if least is not None else f"at most {most}"
        return f"a list of {bound}"
    if kind == "string_pattern_mismatch":
        letters = "letters (a to z), digits, '.', '_', '-', a letter or digit first"
        return f"{letters}, at most 64 characters"
    return message[:1].lower() + message[1:]


def _hint(kind: str, value: object, context: Mapping[str, Any]) -> str | None:
    """The fix, where the value shows what was meant."""
    if kind == "literal_error" and isinstance(value, str):
        return did_you_mean(
            value, context["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        )
    if value == "auto":
        return "write a value or leave it out: `auto` has no meaning here"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}"
    if kind in ("int_type", "float_type") and isinstance(value, str):
        plain = value.replace("_", "")
        if _is_number(value):
            remedy = "for a number from the environment, use an override"
            return f"remove the quotes; {remedy}: KEY={value}"
        if _is_number(plain):
            return f"write {plain}"
    if kind == "bool_type" and value in (0, 1):
        return f"write {'true' if value else 'false'}"
    if kind == "bool_type" and str(value).lower() in ("yes", "no", "on", "off"):
        return f"write {'true' if str(value).lower() in ('yes', 'on') else 'false'}"
    if kind == "string_type" and isinstance(value, (bool, int, float)):
        return "quote it"
    return None


def _as_a_kind(value: object, models: list[type[BaseModel]]) -> str | None:
    """How a word is written that is, or nearly is, one of a union's kinds."""
    kinds = [_kind(model) for model in models if "kind" in model.model_fields]
    near = closest(value, kinds) if isinstance(value, str) else None
    return f"write {{kind: {near}}}" if near else None


_NUMBER = re.compile("|".join(CoreResolver.table[kind][0] for kind in ("int", "float")))


def _is_number(text: str) -> bool:
    """Whether it is read as one where there are no quotes."""
    return _NUMBER.fullmatch(text) is not None

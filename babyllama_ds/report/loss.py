"""The loss of a job in words: settings enter; formula, effective weights and sentences leave."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from babyllama_ds.losses.weights import TokenWeights, effective_token_weights

Moment = Literal["start", "end"]
FORWARD_KL = {"kind": "forward_kl"}


def loss_facts(job: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the student's loss and what they come to for one token.

    Of what changes in the course of the training, `weight_ce` and `weight_kl` are those of its
    first step, and `weights_at_end` those of its last; the latter is null where nothing changes.
    """
    settings, length = job["distillation"], job["windows"]["length"]
    first, last = (_weights(settings, length, moment) for moment in ("start", "end"))
    divergence = settings.get("divergence", FORWARD_KL)
    training = job["student"].get("training") or {}
    facts = {
        "alpha": settings["alpha"],
        "temperature": settings["temperature"],
        "soft_reduction": settings["soft_reduction"],
        "mean_of": settings["mean_of"],
        "divergence": divergence,
        "z_loss": training.get("z_loss"),
        "unlabelled_tokens": list(training.get("unlabelled_tokens", ())),
        "hidden_matching": settings.get("hidden_matching"),
        "window_length": length,
        "weight_ce": first.ce,
        "weight_kl": first.kl,
        "weights_at_end": None if first == last else {"ce": last.ce, "kl": last.kl},
    }
    return facts | {
        "formula": _formula(facts),
        "explanation": " ".join(_sentences(facts, first, last)),
    }


def in_words(value: float | Mapping[str, Any]) -> str:
    """A number, or a schedule's way."""
    if not isinstance(value, Mapping):
        return f"{value:g}"
    return (
        f"{value['start']:g} to {value['end']:g} over {value['over']:.0%} of the steps "
        f"({value['shape']})"
    )


def weights_in_words(loss: Mapping[str, Any], of: Literal["ce", "kl"]) -> str:
    """What a token's CE or divergence weighs; with a schedule, at the first and the last step."""
    first, last = loss[f"weight_{of}"], loss["weights_at_end"]
    return f"{first:g}" if last is None else f"{first:g} to {last[of]:g}"


def name_of_divergence(loss: Mapping[str, Any]) -> str:
    """`KL` for the forward one."""
    return "KL" if loss["divergence"]["kind"] == "forward_kl" else "divergence"


def _weights(settings: Mapping[str, Any], length: int, moment: Moment) -> TokenWeights:
    def at(value: Any) -> float:
        return float(value[moment] if isinstance(value, Mapping) else value)

    return effective_token_weights(
        at(settings["alpha"]), at(settings["temperature"]), settings["soft_reduction"], length
    )


def _formula(facts: Mapping[str, Any]) -> str:
    terms = ["alpha CE", f"(1 - alpha) T² {_divergence(facts['divergence'])}"]
    if facts["z_loss"]:
        terms.append(f"{facts['z_loss']:g} (log Z)²")
    if facts["hidden_matching"]:
        matching = facts["hidden_matching"]
        distance = {"mse": "MSE", "cosine": "(1 - cosine)"}[matching["loss"]]
        terms.append(f"{matching['weight']:g} {distance} of hidden states")
    return f"L = {' + '.join(terms)}"


def _divergence(spec: Mapping[str, Any]) -> str:
    kind, skew = spec["kind"], spec.get("skew", 0.0)
    if kind == "jensen_shannon":
        return f"JSD(teachers, student; beta {spec['beta']:g})"
    return {
        "forward_kl": "KL(teachers ‖ student)",
        "reverse_kl": "KL(student ‖ teachers)",
        "skewed_forward_kl": f"KL(teachers ‖ {skew:g} teachers + {1 - skew:g} student)",
        "skewed_reverse_kl": f"KL(student ‖ {1 - skew:g} teachers + {skew:g} student)",
    }[kind]


def _sentences(facts: Mapping[str, Any], first: TokenWeights, last: TokenWeights) -> list[str]:
    said = [_explain(first.ce, first.kl, facts)]
    if first != last:
        said = [
            f"At the first step: {said[0]} At the last step: {_explain(last.ce, last.kl, facts)}"
        ]
    if facts["hidden_matching"]:
        pairs = len(facts["hidden_matching"]["layers"])
        said.append(
            f"Hidden states of {pairs} {'pair' if pairs == 1 else 'pairs'} of layers are matched "
            "beside it, through matrices that are trained with the student: a mean over positions."
        )
    if facts["z_loss"]:
        said.append("Z is the sum of exp(logits), its term a mean over labelled positions.")
    if facts["unlabelled_tokens"]:
        tokens = ", ".join(f"`{token}`" for token in facts["unlabelled_tokens"])
        said.append(f"No cross-entropy where the next token is {tokens}.")
    return said


def _explain(ce: float, kl: float, facts: Mapping[str, Any]) -> str:
    name, matched = name_of_divergence(facts), facts["hidden_matching"]
    if kl == 0 and matched:
        return (
            f"The {name} has no weight: the teachers' hidden states alone take part (alpha is 1)."
        )
    if kl == 0:
        return f"The {name} has no weight: the teachers do not take part (alpha is 1)."
    if ce == 0:
        return "The cross-entropy has no weight: the student learns from the teachers alone."
    reason = (
        f"the {name} is summed over the {facts['window_length']} positions of a window and "
        "divided by windows only, whereas the cross-entropy is a mean over tokens"
        if facts["soft_reduction"] == "sequence"
        else "both are means over tokens"
    )
    nat = "KL" if name == "KL" else f"the {name}"
    return (
        f"For one token, a nat of {nat} weighs {kl / ce:.4g} times a nat of cross-entropy: "
        f"{reason}."
    )

"""A model's card: the report's dictionary and a model's name enter, its README.md leaves.

The card is a Hugging Face model card: YAML front matter, then Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from babyllama_ds.report.formatting import count, flat, table
from babyllama_ds.report.markdown import (
    gains_table,
    headline,
    loading_snippet,
    models_table,
    trainings,
)

CITATION = """```bibtex
@misc{timiryasov2023babyllama,
  title = {Baby Llama: knowledge distillation from an ensemble of teachers trained on a small
           dataset with no performance penalty},
  author = {Timiryasov, Inar and Tastet, Jean-Loup},
  year = {2023},
  eprint = {2308.02019},
  archivePrefix = {arXiv}
}
@misc{tastet2024babyllama2,
  title = {BabyLlama-2: Ensemble-Distilled Models Consistently Outperform Teachers With Limited
           Data},
  author = {Tastet, Jean-Loup and Timiryasov, Inar},
  year = {2024},
  eprint = {2409.17312},
  archivePrefix = {arXiv}
}
```"""

LIMITS = """\
- It saw little text, of few kinds, in English: it knows few words and almost no facts, and what
  it writes is not to be relied on.
- It continues text; it follows no instructions and was not aligned or filtered. It may repeat
  biases of its training text.
- Development cross-entropy compares with other models only on the same text and, per token, the
  same tokenizer; minimal pairs measure grammar, not understanding.
- The numbers are of one run with one seed."""


def render_model_card(
    report: Mapping[str, Any], model_name: str, *, license_id: str | None = None
) -> str:
    """The card of one of the report's models; without a known license none is claimed."""
    sections = [
        f"# {report['name']}: {model_name}",
        _what_it_is(report, model_name),
        "## Training",
        _training(report, model_name),
        "## Results",
        *_results(report),
        "## Provenance",
        _provenance(report, model_name),
        "## Limits",
        LIMITS,
        "## Use",
        "Give it the beginning of a text (training had no start token):",
        loading_snippet("path/to/this/directory"),
        "## Citation",
        "The method is that of BabyLlama (arXiv 2308.02019) and BabyLlama-2 (arXiv 2409.17312).",
        CITATION,
    ]
    return _front_matter(report, model_name, license_id) + "\n\n".join(sections) + "\n"


def _front_matter(report: Mapping[str, Any], model_name: str, license_id: str | None) -> str:
    role = report["models"][model_name]["role"]
    kind = _spec(report, model_name)["model"]["kind"]
    tags = ["babylm", "babyllama", *([] if kind == "pretrained" else [kind])]
    if role == "student":
        tags.append("knowledge-distillation")
    front: dict[str, Any] = {
        "language": "en",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if license_id is not None:
        front["license"] = license_id
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n"


def _what_it_is(report: Mapping[str, Any], model_name: str) -> str:
    model = report["models"][model_name]
    size = f" of {count(model['params'])} parameters" if model["params"] is not None else ""
    teachers = [name for name, other in report["models"].items() if other["role"] == "teacher"]
    by_role = {
        "student": f"distilled from {_listed(teachers)}, frozen",
        "control": "trained like the student of its run, with the same initialisation and data "
        "order, but without teachers: the comparison that tells what distillation gave",
        "teacher": "a teacher, from which the student of its run was distilled",
    }
    return f"A small causal language model{size}, {by_role[model['role']]}."


def _training(report: Mapping[str, Any], model_name: str) -> str:
    role = report["models"][model_name]["role"]
    lines = [_corpus(report["job"]), *_optimisation(report, model_name)]
    if role == "student":
        loss = report["loss"]
        lines.append(
            f"Loss: `L = alpha CE + (1 - alpha) T² KL(teachers ‖ student)` with alpha "
            f"{loss['alpha']:g}, T {loss['temperature']:g}, the mean of the teachers' "
            f"{loss['mean_of']}, `soft_reduction: {loss['soft_reduction']}`. {loss['explanation']}"
        )
    return "\n".join(f"- {line}" for line in lines)


def _provenance(report: Mapping[str, Any], model_name: str) -> str:
    """Everything that names this run, whole: the card travels without the report."""
    environment = report["environment"]
    stage = {"teacher": f"teachers/{model_name}"}.get(report["models"][model_name]["role"])
    made_from = environment.get("fingerprints") or {}
    facts = {
        "commit": environment.get("commit"),
        "job sha256": report["job_sha256"],
        "tokenizer sha256": made_from.get("tokenizer"),
        "tokens sha256 (text and tokenizer)": made_from.get("tokens"),
        "seed of the job": report["job"]["seed"],
        # The control is the student's twin: it has its seed.
        "seed of this model": (environment.get("seeds") or {}).get(stage or "student"),
        "ranks": environment.get("ranks"),
        "precision": environment.get("precision"),
        "versions": environment.get("versions") or {},
        "hardware": environment.get("hardware"),
    }
    return table(["what", "value"], [[key, value] for key, value in flat(facts)], left=2)


def _corpus(job: Mapping[str, Any]) -> str:
    kind = job.get("corpus", {}).get("kind")
    text = {
        "nursery": "synthetic child-directed English from a small grammar",
        "files": "the text files that the job names",
    }.get(kind, "text")
    return f"Text: {text}, in windows of {job['windows']['length']} tokens."


def _optimisation(report: Mapping[str, Any], model_name: str) -> list[str]:
    training = _spec(report, model_name).get("training")
    if not training:
        return ["Loaded, not trained here."]
    seen = report["models"][model_name]["train_tokens"]
    tokens = f", {count(seen)} tokens seen" if seen is not None else ""
    return [
        f"AdamW, learning rate {training['learning_rate']:g} ({training['schedule']}, "
        f"{training['warmup_steps']} warm-up steps), weight decay {training['weight_decay']:g}, "
        f"{training['batch_windows']} windows a step, at most {training['epochs']:g} "
        f"epochs{tokens}."
    ]


def _results(report: Mapping[str, Any]) -> list[str]:
    if all(model["dev_ce"] is None for model in report["models"].values()):
        return ["Not evaluated."]
    return [
        headline(report),
        models_table(report),
        *trainings(report),
        gains_table(report),
        report["gains"]["note"],
    ]


def _spec(report: Mapping[str, Any], model_name: str) -> Mapping[str, Any]:
    """The model's part of the job; the control is the student with, maybe, its own training."""
    job = report["job"]
    role = report["models"][model_name]["role"]
    if role == "teacher":
        return next(t for t in job["teachers"] if t["name"] == model_name)
    own = (job["control"] or {}).get("training") if role == "control" else None
    return {**job["student"], "training": own or job["student"]["training"]}


def _listed(names: list[str]) -> str:
    if len(names) == 1:
        return f"one teacher ({names[0]})"
    return f"an ensemble of {len(names)} teachers ({', '.join(names)})"

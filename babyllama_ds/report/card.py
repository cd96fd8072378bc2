"""A model's card: the report's dictionary and a model's name enter, its README.md leaves.

The card is a Hugging Face model card: YAML front matter with the results in the hub's own schema
(`model-index`), then Markdown. Every number is the run's own; what a run does not know is left
out, and what only a person can know (a license, the language of a text) is asked for or left to
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from babyllama_ds import __version__
from babyllama_ds.report import words
from babyllama_ds.report.fine_tuning import METRICS, chosen_on
from babyllama_ds.report.formatting import MISSING, count, duration, flat, number, table
from babyllama_ds.report.loss import in_words, name_of_divergence, weights_in_words
from babyllama_ds.report.markdown import (
    fine_tuning_sections,
    gains_table,
    headline,
    loading_snippet,
    models_table,
)
from babyllama_ds.report.milestones import how_measured, measures

CITATION = """@misc{timiryasov2023babyllama,
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
}"""

SAW_LITTLE = """\
- It saw little text, of few kinds: it knows few words and almost no facts, and what it writes is
  not to be relied on. It is made for research, not for production."""

SAW_MORE = """\
- What it saw before this run is not told here. What it writes is not to be relied on: it is made
  for research, not for production."""

LIMITS = """\
- It continues text; it follows no instructions and was not aligned or filtered. It may repeat
  biases of its training text.
- Development cross-entropy compares with other models only on the same text and, per token, the
  same tokenizer; minimal pairs such as BLiMP's measure grammar, not understanding.
- Whoever compares sentences by their log-probabilities should load it with `dtype=float32`: sums in
  bf16 are often equal, and where equals count as right it would score too high.
- The numbers are of one run with one seed."""

MOST_DOMAINS_SHOWN = 20
HUB_METRICS = {"accuracy": "accuracy", "f1": "f1", "mcc": "matthews_correlation"}


def render_model_card(
    report: Mapping[str, Any],
    model_name: str,
    *,
    license_id: str | None = None,
    language: str | None = None,
    place: str = ".",
    float32: bool = False,
) -> str:
    """The card of one of the report's models.

    `license_id` and `language` (a code such as `en`) are the hub's; without them no license is
    claimed, and no language but that of a text written here. `place` is where the card's code
    loads the model from: a repository's name, or the directory that the card lies in. `float32`:
    its weights were cast to that type since.
    """
    where = "From the hub" if place != "." else "In this directory"
    sections = [
        f"# {report['name']}: {model_name}",
        _what_it_is(report, model_name),
        "## Use",
        f"{where}; give it the beginning of a text (training had no start token):",
        _pipeline_snippet(place),
        "Or, the parts:",
        loading_snippet(place),
        "## Data",
        *_data(report),
        "## Training",
        *_training(report, model_name),
        "## Results",
        *_results(report),
        "## Limits",
        f"{SAW_MORE if _is_pretrained(report, model_name) else SAW_LITTLE}\n{LIMITS}",
        "## License",
        _license(license_id),
        "## Provenance",
        _provenance(report, model_name, cast=" before the cast to fp32" if float32 else ""),
        "## Citation",
        "The method is that of BabyLlama (arXiv 2308.02019) and BabyLlama-2 (arXiv 2409.17312).",
        _citation(report),
    ]
    front = _front_matter(report, model_name, license_id, language)
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def render_milestone_card(
    report: Mapping[str, Any],
    model_name: str,
    training: Mapping[str, Any],
    *,
    license_id: str | None = None,
    language: str | None = None,
    place: str = ".",
) -> str:
    """The card of what was kept of a model on its way, of which `training` tells.

    It lies in a branch of the repository `place`, whose `main` has the finished model.
    """
    name = training["milestone"]
    sections = [
        f"# {report['name']}: {model_name}, {name}",
        f"The model of the branch `main` as it was after {training['words']:,} words "
        f"({training['train_tokens']:,} tokens, {training['steps']:,} optimizer steps) of its "
        "training: kept on the way, at the learning rate of then. How it was made, and what came "
        "of it in the end, stands in the card of `main`, whose results are not this model's.",
        *_results_of_milestone(report, model_name, name),
        "## Use",
        loading_snippet(place, revision=name),
        "## License",
        _license(license_id),
    ]
    front = _front_matter(report, model_name, license_id, language)
    front.eval_results = None
    return f"---\n{front.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


# -- the front matter -----------------------------------------------------------------------------


def _front_matter(
    report: Mapping[str, Any], model_name: str, license_id: str | None, language: str | None
) -> ModelCardData:
    role = report["models"][model_name]["role"]
    kind = _spec(report, model_name)["model"]["kind"]
    tags = ["babylm", "babyllama", *([] if kind == "pretrained" else [kind])]
    if role == "student":
        tags.append("knowledge-distillation")
    return ModelCardData(
        language=language or _language(report["job"]),
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
        model_name=f"{report['name']}: {model_name}",
        eval_results=list(_eval_results(report, model_name)) or None,
    )


def _language(job: Mapping[str, Any]) -> str | None:
    """Of a text that is written here; nobody has told what other texts are in."""
    return "en" if job.get("corpus", {}).get("kind") == "nursery" else None


def _eval_results(report: Mapping[str, Any], model_name: str) -> Iterator[EvalResult]:
    """The model's measurements, as the hub's `model-index` has them."""
    model = report["models"][model_name]
    corpus = report["job"].get("corpus", {}).get("kind", "text")
    on_dev = {
        "dev_ce": ("cross_entropy", "cross-entropy (nats/token)"),
        "perplexity": ("perplexity", "perplexity"),
        "bits_per_byte": ("bits_per_byte", "bits per byte"),
    }
    for key, (metric, name) in on_dev.items():
        if model[key] is not None:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=corpus,
                dataset_name=f"the development text of the run ({corpus})",
                dataset_split="dev",
                metric_type=metric,
                metric_name=name,
                metric_value=model[key],
            )
    for benchmark, accuracy in model["minimal_pairs"].items():
        yield EvalResult(
            task_type="text-generation",
            dataset_type=benchmark,
            dataset_name=f"{benchmark} (minimal pairs)",
            metric_type="accuracy",
            metric_name="accuracy (mean over tasks)",
            metric_value=accuracy,
        )
    for name, suite in report["fine_tuning"].items():
        for task, facts in suite["tasks"].items():
            if model_name in facts["score"]:
                yield EvalResult(
                    task_type="text-classification",
                    dataset_type=name,
                    dataset_name=f"{name}: {task}, after fine-tuning",
                    dataset_config=task,
                    dataset_split="validation",
                    metric_type=HUB_METRICS[facts["metric"]],
                    metric_name=f"{METRICS[facts['metric']]} (best epoch on {chosen_on(task)})",
                    metric_value=facts["score"][model_name],
                )


# -- sections -------------------------------------------------------------------------------------


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
    sentence = f"A small causal language model{size}, {by_role[model['role']]}."
    return " ".join([sentence, *_weights_of_others(report, model_name)])


def _is_pretrained(report: Mapping[str, Any], model_name: str) -> bool:
    return bool(_spec(report, model_name)["model"]["kind"] == "pretrained")


def _weights_of_others(report: Mapping[str, Any], model_name: str) -> Iterator[str]:
    """Whose weights it has or began with, if not its own: those of a hub id are named, a directory
    is nobody's but the run's."""
    if not _is_pretrained(report, model_name):
        return
    spec = _spec(report, model_name)
    path, revision = spec["model"]["path"], spec["model"].get("revision")
    known = path if revision is None else f"{path}@{revision}"
    commits = (report["environment"].get("settled") or {}).get("hub") or {}
    whose = f"`{path}` (commit {commits[known]})" if known in commits else "another model"
    if spec.get("training"):
        yield f"It began with the weights of {whose} and was trained further on the text below."
    else:
        yield (
            f"Its weights are those of {whose}, loaded by the run: it was not trained on the text "
            "below, only measured on it."
        )


def _data(report: Mapping[str, Any]) -> list[str]:
    """The text, and what it comes to in each split and domain."""
    sections = [_corpus(report["job"])]
    splits = report.get("data") or {}
    if not splits:
        return sections
    domains = list(dict.fromkeys(name for one in splits.values() for name in one["domains"]))
    rows = [
        [name, *(number(one["domains"].get(name), 0) for one in splits.values())]
        for name in domains[:MOST_DOMAINS_SHOWN]
    ]
    if len(domains) > MOST_DOMAINS_SHOWN:
        rows.append([f"({len(domains) - MOST_DOMAINS_SHOWN} more)", *([""] * len(splits))])
    rows += [
        ["all", *(number(one["tokens"], 0) for one in splits.values())],
        ["words (by whitespace)", *(number(one["words"], 0) for one in splits.values())],
        ["bytes of cleaned text", *(number(one["bytes"], 0) for one in splits.values())],
    ]
    return [*sections, table(["domain", *(f"{split} (tokens)" for split in splits)], rows)]


def _corpus(job: Mapping[str, Any]) -> str:
    corpus, windows = job.get("corpus", {}), job["windows"]
    text = {
        "nursery": "synthetic child-directed English from a small grammar",
        "files": "the text files that the job names",
        "hub": "the hub dataset that the job names",
        "mix": "a mix of the sources that the job names",
    }.get(corpus.get("kind"), "text")
    cleaned = {
        "babylm": ", cleaned by BabyLlama's rules for each domain",
        "published": ", cleaned by BabyLlama's rules for each domain to the letter",
        "none": ", taken as it is",
    }.get(corpus.get("cleaning"), "")
    offsets = windows.get("offsets")
    cut = f" (offsets: {offsets})" if isinstance(offsets, str) else ""
    return f"Text: {text}{cleaned}, in windows of {windows['length']} tokens{cut}."


def _training(report: Mapping[str, Any], model_name: str) -> list[str]:
    role = report["models"][model_name]["role"]
    lines = _optimisation(report, model_name)
    if role == "student":
        loss = report["loss"]
        lines += [
            f"Teachers: {'; '.join(_teachers(report))}.",
            f"Loss: `{loss['formula']}` with alpha {in_words(loss['alpha'])}, "
            f"T {in_words(loss['temperature'])}, the mean of the teachers' "
            f"{loss['mean_of']}, `soft_reduction: {loss['soft_reduction']}`. For one token that is "
            f"{weights_in_words(loss, 'ce')} CE + {weights_in_words(loss, 'kl')} "
            f"{name_of_divergence(loss)}. {loss['explanation']}",
        ]
    settings = _spec(report, model_name).get("training") or {}
    rows = [[key, value] for key, value in flat(settings) if value != MISSING]
    listed = "\n".join(f"- {line}" for line in lines)
    return [listed, *([table(["setting", "value"], rows, left=2)] if rows else [])]


def _optimisation(report: Mapping[str, Any], model_name: str) -> list[str]:
    training = _spec(report, model_name).get("training")
    if not training:
        return ["Loaded, not trained here."]
    model = report["models"][model_name]
    seen = f", {count(model['train_tokens'])} tokens seen" if model["train_tokens"] else ""
    muon = training.get("muon")
    matrices = f"Muon at {muon['learning_rate']:g} for the layers' matrices, else " if muon else ""
    lines = [
        f"{matrices}AdamW, learning rate {training['learning_rate']:g} ({training['schedule']}, "
        f"{training['warmup_steps']} warm-up steps), weight decay {training['weight_decay']:g}, "
        f"{training['batch_windows']} windows a step, at most {training['epochs']:g} "
        f"epoch{'s' * (training['epochs'] != 1)}{seen}."
    ]
    if model["seconds"] and model["steps"]:
        where = [report["environment"].get(key) for key in ("ranks", "device")]
        on = f" on {where[0]} {where[1]} rank{'s' * (where[0] > 1)}" if all(where) else ""
        if words.trained_elsewhere(report, model_name):
            on = ", in another run, which shares it through the store"
        if runs := words.taken_over(report, model_name):
            on = f", in {runs}, one after another"
        lines.append(f"{model['steps']:,} steps in {duration(model['seconds'])}{on}.")
    return lines


def _teachers(report: Mapping[str, Any]) -> Iterator[str]:
    for spec in report["job"]["teachers"]:
        params = report["models"][spec["name"]]["params"]
        facts = [
            spec["model"]["kind"],
            *([f"{count(params)} parameters"] if params is not None else []),
            f"weight {spec.get('weight', 1.0):g}",
        ]
        yield f"{spec['name']} ({', '.join(facts)})"


def _results(report: Mapping[str, Any]) -> list[str]:
    if all(model["dev_ce"] is None for model in report["models"].values()):
        return ["Not evaluated."]
    return [
        headline(report),
        models_table(report),
        *words.trainings(report),
        gains_table(report),
        report["gains"]["note"],
        *fine_tuning_sections(report, "###"),
    ]


def _results_of_milestone(report: Mapping[str, Any], model_name: str, name: str) -> list[str]:
    measured = {one["name"]: one for one in report["milestones"].get(model_name, ())}
    if name not in measured:
        return []
    scores = [[title, number(value, 4)] for title, value in measures(measured[name]).items()]
    return ["## Results", table(["measure", "value"], scores), how_measured(report)]


def _license(license_id: str | None) -> str:
    text = "The text that it was trained on, and teachers that were loaded, have licenses of their"
    if license_id is None:
        return f"None is claimed here: that is for whoever publishes the model. {text} own."
    return f"`{license_id}`, as whoever published the model says. {text} own."


def _provenance(report: Mapping[str, Any], model_name: str, *, cast: str) -> str:
    """Everything that names this run, whole: the card travels without the report."""
    environment = report["environment"]
    stage = {"teacher": f"teachers/{model_name}"}.get(report["models"][model_name]["role"])
    made_from = environment.get("fingerprints") or {}
    weights = (report.get("weights") or {}).get(model_name) or {}
    facts = {
        "commit": environment.get("commit"),
        "job sha256": report["job_sha256"],
        "tokenizer sha256": made_from.get("tokenizer"),
        "tokens sha256 (text and tokenizer)": made_from.get("tokens"),
        **{f"{name} sha256{cast}": digest for name, digest in weights.items()},
        "seed of the job": report["job"]["seed"],
        # The control is the student's twin: it has its seed.
        "seed of this model": (environment.get("seeds") or {}).get(stage or "student"),
        "ranks": environment.get("ranks"),
        "precision": environment.get("precision"),
        "versions": environment.get("versions") or {},
        "hardware": environment.get("hardware"),
    }
    return table(["what", "value"], [[key, value] for key, value in flat(facts)], left=2)


def _citation(report: Mapping[str, Any]) -> str:
    versions = report["environment"].get("versions") or {}
    commit = report["environment"].get("commit")
    lines = [
        "@misc{babyllama_ds,",
        "  title = {babyllama\\_ds: small LLaMA models distilled from ensembles of teachers},",
        f"  version = {{{versions.get('babyllama_ds') or __version__}}},",
        *([f"  note = {{commit {commit}}},"] if commit else []),
        "}",
    ]
    return "\n".join(["```bibtex", CITATION, *lines, "```"])


def _pipeline_snippet(place: str) -> str:
    return f"""```python
from transformers import pipeline

generator = pipeline("text-generation", model="{place}")
print(generator("The little dog")[0]["generated_text"])
```"""


# -- helpers --------------------------------------------------------------------------------------


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

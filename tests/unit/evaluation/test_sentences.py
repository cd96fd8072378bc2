"""Sentences: their ids are what was asked for, their scores those of a plain implementation."""

from __future__ import annotations

import math
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from babyllama_ds import ranks
from babyllama_ds.errors import DataError, ModelError
from babyllama_ds.evaluation import forward
from babyllama_ds.evaluation.sentences import (
    length_batches,
    part_encoder,
    score_sentences,
    sentence_encoder,
)

V = 61
TEXT = ["the cat sees the dogs .", "The dogs see the cat .", "who do the cats see ?"]


def tiny_llama():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=24,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def tiny_gpt2():
    torch.manual_seed(4)
    config = GPT2Config(
        vocab_size=V, n_embd=24, n_layer=2, n_head=3, n_positions=24, initializer_range=0.3
    )
    return GPT2LMHeadModel(config)  # in training mode, with dropout


def random_sentences(count=40, longest=24):
    draw = random.Random(7)
    return [[draw.randrange(V) for _ in range(draw.randint(0, longest))] for _ in range(count)] + [
        [5] * longest,
        [5, 6],
        [5, 6],
    ]


@torch.no_grad()
def reference_score(model, ids, first=1) -> float:
    """One sentence at a time, from the model's own full logits."""
    model.eval()
    total = 0.0
    if len(ids) > 1:
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        for position in range(first, len(ids)):
            total += log_probs[position - 1, ids[position]].item()
    return total


def score(model, sentences, batch_tokens=64, **options):
    return score_sentences(
        model, sentences, device="cpu", batch_tokens=batch_tokens, vocab_size=V, **options
    )


# -- scoring ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_scores_agree_with_a_plain_implementation(build) -> None:
    sentences = random_sentences()
    scores = score(build(), sentences)
    model = build()
    expected = [reference_score(model, ids) for ids in sentences]
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len({round(value, 3) for value in expected}) > 30  # sentences do differ


@pytest.mark.parametrize("batch_tokens", [1, 24, 100_000])
def test_scores_do_not_depend_on_batching_or_order(batch_tokens) -> None:
    model = tiny_llama()
    sentences = random_sentences()
    expected = score(model, sentences)
    scores = score(model, sentences[::-1], batch_tokens=batch_tokens)[::-1]
    assert scores == pytest.approx(expected, rel=1e-5)


def test_too_short_sentences_score_zero() -> None:
    assert score(tiny_llama(), [[], [7]]) == [0.0, 0.0]


def test_identical_sentences_are_scored_once_and_equal() -> None:
    model, rows = tiny_llama(), []
    model.model.register_forward_hook(
        lambda module, args, kwargs, out: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    first, other, second = score(model, [[1, 2, 3, 4], [4, 3, 2, 1], [1, 2, 3, 4]])
    assert first == second != other
    assert sum(rows) == 2


def random_firsts(sentences) -> list[int]:
    """Sometimes the second token, sometimes none, mostly one between them."""
    draw = random.Random(8)
    return [draw.randint(1, max(1, len(ids))) for ids in sentences]


@pytest.mark.parametrize("batch_tokens", [1, 100_000])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_scores_of_parts_agree_with_a_plain_implementation(build, batch_tokens) -> None:
    sentences = random_sentences() + random_sentences()[::-1]  # all twice, of other parts
    firsts = random_firsts(sentences)
    assert 1 in firsts
    assert any(first == len(ids) for first, ids in zip(firsts, sentences, strict=True))
    scores = score(build(), sentences, batch_tokens=batch_tokens, firsts=firsts)
    model = build()
    expected = [reference_score(model, *one) for one in zip(sentences, firsts, strict=True)]
    assert scores == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert len({round(value, 3) for value in expected}) > 60


def test_what_is_not_scored_costs_no_logits(monkeypatch) -> None:
    seen, plain = [], forward.cross_entropy_sum

    def counting(hidden, *given, **named):
        seen.append(len(hidden))
        return plain(hidden, *given, **named)

    monkeypatch.setattr(forward, "cross_entropy_sum", counting)
    ids, other = list(range(20)), list(range(9))
    score(tiny_llama(), [ids, other, other, [1, 2]], firsts=[17, 8, 9, 2])
    assert seen == [3 + 1]  # and what has nothing to score is not read at all


def test_the_same_sentence_scored_in_other_parts_is_another() -> None:
    model, ids = tiny_llama(), [1, 2, 3, 4, 5]
    whole, end, again, nothing = score(model, [ids] * 4, firsts=[1, 3, 3, 5])
    assert whole == pytest.approx(reference_score(model, ids), rel=1e-5)
    assert end == again == pytest.approx(reference_score(model, ids, 3), rel=1e-5)
    assert nothing == 0
    assert whole < end < 0


def test_length_batches_are_a_partition_within_the_budget() -> None:
    lengths = [len(ids) for ids in random_sentences(200)]
    batches = length_batches(lengths, 50)
    assert sorted(i for batch in batches for i in batch) == [
        i for i, length in enumerate(lengths) if length >= 2
    ]
    longest = [max(lengths[i] for i in batch) for batch in batches]
    assert all(len(batch) * width <= 50 for batch, width in zip(batches, longest, strict=True))
    assert longest == sorted(longest, reverse=True)  # the most memory first
    assert len(batches) < len(lengths) / 3
    # A sentence above the budget still gets its batch.
    assert length_batches([9, 3, 80, 0, 1], 10) == [[2], [0], [1]]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches(world, parts, monkeypatch) -> None:
    model, sentences, shares = tiny_llama(), random_sentences(), []
    of_parts = {"firsts": random_firsts(sentences)} if parts else {}
    expected = score(model, sentences, **of_parts)
    monkeypatch.setattr(ranks, "world_size", lambda: world)
    monkeypatch.setattr(ranks, "on_every_rank", lambda work: work())
    monkeypatch.setattr(ranks, "max_int", lambda value: value)
    # Simulated ranks hand in their shares one after another; the last sees all of them.
    monkeypatch.setattr(ranks, "gather_objects", lambda share: [*shares, shares.append(share)][:-1])
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        score(model, sentences, **of_parts)
    monkeypatch.setattr(ranks, "gather_objects", lambda share: shares)
    assert score(model, sentences, **of_parts) == expected
    indices = [index for share in shares for index in share]
    assert len(indices) == len(set(indices))  # nobody worked on another's sentences
    assert all(len(share) > 5 for share in shares)


@pytest.mark.usefixtures("alone")  # where ranks have started, transformers looks at no windows
def test_every_batch_is_on_its_way_before_a_score_is_waited_for() -> None:
    """On `meta`, where a tensor has a shape and no values, whatever looks at them fails."""
    done = []
    with pytest.raises(RuntimeError, match="meta"):
        score_sentences(
            tiny_llama().to("meta"),
            [[1, 2, 3], [4, 5], [6, 7, 8]],
            device="meta",
            batch_tokens=4,
            vocab_size=V,
            on_batch=lambda number, _: done.append(number),
        )
    assert done == [1, 2, 3]


def test_longer_than_the_models_positions_is_an_error() -> None:
    for build in (tiny_llama, tiny_gpt2):
        with pytest.raises(DataError, match="sentence 2: got 25 tokens, expected at most 24"):
            score(build(), [[1, 2], [3] * 25])
    with pytest.raises(DataError, match=r"tasks/a\.jsonl:9: sentence: got 25 tokens"):
        score(tiny_llama(), [[1, 2], [3] * 25], sources=["tasks/a.jsonl:1", "tasks/a.jsonl:9"])


def test_not_a_number_is_an_error() -> None:
    model = tiny_llama()
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="log-probability of nan, expected a finite number"):
        score(model, [[1, 2, 3]])


# -- tokenization -------------------------------------------------------------------------------


def byte_level_tokenizer(*, add_prefix_space: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def metaspace_tokenizer(*, prepend: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always" if prepend else "never")]
    )
    return trained(tokenizer, [])


def prepending_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return trained(tokenizer, [])


def trained(tokenizer: Tokenizer, alphabet: list[str]) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for text in TEXT for _ in range(5)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize(
    ("tokenizer", "space"),
    [
        (byte_level_tokenizer(add_prefix_space=True), "Ġ"),
        (byte_level_tokenizer(add_prefix_space=False), "Ġ"),
        (metaspace_tokenizer(prepend=True), "▁"),
        (metaspace_tokenizer(prepend=False), "▁"),
        (prepending_tokenizer(), "▁"),
    ],
)
def test_exactly_one_leading_space_or_none(tokenizer, space) -> None:
    sentences = ["the cat", " the cat", "\n  the cat"]
    before = tokenizer.backend_tokenizer.to_str()
    for leading_space, first in ((True, space + "the"), (False, "the")):
        encode = sentence_encoder(tokenizer, leading_space=leading_space)
        for ids in encode(sentences):
            text = "".join(tokenizer.convert_ids_to_tokens(ids))
            assert text == f"{first}{space}cat"
    assert tokenizer.backend_tokenizer.to_str() == before  # the tokenizer itself is as it was


def test_with_a_leading_space_ids_are_those_of_running_text() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    encode = sentence_encoder(tokenizer, leading_space=True)
    assert encode(TEXT) == [tokenizer(text).input_ids for text in TEXT]


def test_no_special_tokens_padding_or_truncation() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    short, long = sentence_encoder(tokenizer, leading_space=True)(["the", "the cat sees the"])
    assert len(short) == 1
    assert len(long) == 4
    assert not {0, 1, 2} & {*short, *long}


def test_a_prefix_token_stands_before_each_sentence_and_nothing_else() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    plain = sentence_encoder(tokenizer, leading_space=True)(TEXT)
    assert sentence_encoder(tokenizer, leading_space=True, prefix="bos")(TEXT) == [
        [1, *ids] for ids in plain
    ]


def test_a_prefix_token_that_there_is_not_is_an_error() -> None:
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    tokenizer.bos_token = None
    with pytest.raises(DataError, match=r"evaluation\.prefix: got bos, and a tokenizer without"):
        sentence_encoder(tokenizer, leading_space=True, prefix="bos")
    assert sentence_encoder(tokenizer, leading_space=True)(TEXT)


def test_line_breaks_within_a_sentence_stay() -> None:
    """BabyLM's supplement has dialogues: one speaker a line."""
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    encode = sentence_encoder(tokenizer, leading_space=True)
    (ids,) = encode(["who do the cats see ?\nthe dogs ."])
    text = "".join(tokenizer.convert_ids_to_tokens(ids))
    assert text == "ĠwhoĠdoĠtheĠcatsĠseeĠ?ĊtheĠdogsĠ."


def test_a_token_without_an_embedding_is_an_error() -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:9: sentence: got token id 61, expected ids be"):
        score(tiny_llama(), [[1, 2], [3, 61]], sources=["a.jsonl:1", "a.jsonl:9"])


def test_log_probability_of_a_constant_model_by_hand() -> None:
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert score(model, [[1, 2, 3, 4]]) == pytest.approx([-3 * math.log(V)], rel=1e-6)


# -- parts --------------------------------------------------------------------------------------

PARTS = [
    ("the cat sees", " the dogs ."),
    ("The dogs see the ", "cat ."),
    ("  \n the cat", " sees"),  # what is removed before it is no character of the part
    ("who do\nthe cats see ?\n", "the dogs"),
    ("who do the cats see ?", "\nthe dogs ."),
    ("the café ", "日本 é"),
    ("the café 日", "本 é 🙂 cats"),
    ("🙂", "🙂"),
    ("the ca", "ts see"),  # within a token
    ("the cat  ", "  sees"),
    ("\n ", "the cat sees"),  # nothing is left before it
]
FOREIGN = ["the café 日本 é 🙂 cats", "who do\nthe"]


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As converted from SentencePiece: what it does not know is bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", *fallback], show_progress=False
    )
    tokenizer.train_from_iterator([text for text in TEXT for _ in range(5)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<unk>")


def unigram_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([text for text in [*TEXT, *FOREIGN] for _ in range(5)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def wordpiece_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=60, special_tokens=["[CLS]", "[UNK]"], show_progress=False
    )
    tokenizer.train_from_iterator([text for text in [*TEXT, *FOREIGN] for _ in range(5)], trainer)
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="[CLS]")


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """Its offsets leave out spaces, as GPT-2's; its tokens may end with them, as Llama 3's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = ByteLevel(trim_offsets=True)
    return trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


METASPACE = decoders.Replace("▁", " ")
LETTERS = [decoders.Replace("##", ""), decoders.Fuse()]
TOKENIZERS = {
    "byte-level": (byte_level_tokenizer(add_prefix_space=False), [decoders.ByteLevel()]),
    "with a space": (byte_level_tokenizer(add_prefix_space=True), [decoders.ByteLevel()]),
    "trimming": (trimming_tokenizer(), [decoders.ByteLevel()]),
    "byte fallback": (
        byte_fallback_tokenizer(),
        [METASPACE, decoders.ByteFallback(), decoders.Fuse()],
    ),
    "unigram": (unigram_tokenizer(), [METASPACE, decoders.Fuse()]),
    "wordpiece": (wordpiece_tokenizer(), LETTERS),
}


def first_beyond(tokenizer, steps, context: str, ids: list[int]) -> int:
    """The first token that is not of the context: the tokens before are all that spell it, or as
    much of it as tokens without its end do."""
    decoder = decoders.Sequence(steps)

    def letters(text: str) -> str:
        # WordPiece knows neither spaces nor capitals.
        return "".join(text.lower().split()) if steps is LETTERS else text

    tokens = tokenizer.convert_ids_to_tokens(ids)
    return max(
        number
        for number in range(len(ids) + 1)
        if letters(context).startswith(letters(decoder.decode(tokens[:number])))
    )


@pytest.mark.parametrize("prefix", ["none", "bos"])
@pytest.mark.parametrize("leading_space", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_part_begins_with_the_token_that_holds_its_first_character(
    name, leading_space, prefix
) -> None:
    tokenizer, steps = TOKENIZERS[name]
    encode = part_encoder(tokenizer, leading_space=leading_space, prefix=prefix)
    plain = sentence_encoder(tokenizer, leading_space=leading_space)
    before = [tokenizer.bos_token_id] if prefix == "bos" else []
    for context, part in PARTS:
        ((ids, first),) = encode([(context + part, len(context))])
        (alone,) = plain([context + part])
        assert ids == [*before, *alone]
        given = (" " if leading_space else "") + context.lstrip()
        begins = first_beyond(tokenizer, steps, given, alone) if context.strip() else 0
        assert first == max(1, len(before) + begins), (context, part)


def test_the_space_before_a_part_by_hand() -> None:
    """It is scored where it is one token with what follows, not where it is a token by itself."""
    tokenizer = byte_level_tokenizer(add_prefix_space=True)
    encode = part_encoder(tokenizer, leading_space=True)

    def scored(context: str, part: str) -> list[str]:
        ((ids, first),) = encode([(context + part, len(context))])
        return tokenizer.convert_ids_to_tokens(ids[first:])

    assert scored("the cat ", "sees the") == ["Ġsees", "Ġthe"]
    assert scored("the cat", " sees the") == ["Ġsees", "Ġthe"]
    assert scored("the cat ", "é") == ["Ã", "©"]
    assert scored("the cat", " é") == ["Ġ", "Ã", "©"]
    assert scored("the caté", "🙂é") == ["ð", "Ł", "Ļ", "Ĥ", "Ã", "©"]
    assert scored("the cat ", "") == []
    assert scored("", "the cat") == ["Ġcat"]  # the first token has none before it

"""Who is called what, and whether questions are answered by the state of the scene."""

from __future__ import annotations

from babyllama_ds.corpus.nursery import lexicon as lex
from babyllama_ds.corpus.nursery import questions, remarks
from babyllama_ds.corpus.nursery.held_out import Draw
from babyllama_ds.corpus.nursery.story import Entity, Spot, Story

ANNA, TOM, _, LILY = lex.NAMES[:4]
BALL = lex.THINGS[0]
TABLE, BED = lex.FURNITURE[:2]
SEEDS = range(60)


def _story(seed: int) -> tuple[Story, Entity, Entity, Entity]:
    story = Story(Draw(f"story {seed}", training=False), lex.PLACES[0], (BALL,), "now")
    anna, tom = Entity(ANNA, "she", known=True), Entity(TOM, "he", known=True)
    ball = Entity(BALL, "it", known=True, adjective=lex.COLOURS[0])
    story.actors, story.things = [anna, tom], [ball]
    story.furniture = [Entity(TABLE, "it", known=True), Entity(BED, "it", known=True)]
    return story, anna, tom, ball


def test_pronouns_are_used_only_without_a_rival() -> None:
    seconds = set()
    for seed in SEEDS:
        story, anna, tom, _ = _story(seed)
        lily = Entity(LILY, "she", known=True)
        story.emit(story.clause(anna, lex.SEE, tom))
        story.emit(story.clause(anna, lex.RUN))
        seconds.add(story.sentences[1])
        story.emit(story.clause(anna, lex.SEE, lily))
        story.emit(story.clause(lily, lex.RUN))
        assert story.sentences[3] == "Lily runs."
    assert seconds == {"She runs.", "Anna runs."}


def test_the_subject_itself_is_reflexive() -> None:
    for seed in SEEDS:
        story, anna, tom, _ = _story(seed)
        assert story.clause(tom, lex.WASH, tom) == "Tom washes himself"
        story.emit("so")
        boys = Entity(lex.PEOPLE[0], "they", known=True)
        assert story.clause(boys, lex.SEE, boys).endswith("see themselves")
        story.emit("so")
        assert story.clause(anna, lex.HURT, anna).endswith("hurts herself")


def test_new_things_are_indefinite_then_definite() -> None:
    for seed in SEEDS:
        story, _, _, ball = _story(seed)
        ball.known = False
        assert story.describe(ball) in ("a ball", "a red ball")
        assert story.describe(ball) in (
            f"{word} {noun}" for word in ("the", "this", "that") for noun in ("ball", "red ball")
        )


def test_one_s_own_things_take_a_bound_possessive() -> None:
    for seed in SEEDS:
        story, anna, tom, ball = _story(seed)
        ball.owner, ball.known = anna, False
        assert "her" in story.clause(anna, lex.WANT, ball).split()
        story.emit("so")
        story, anna, tom, ball = _story(seed)
        ball.owner, ball.known = anna, False
        assert "Anna's" in story.clause(tom, lex.WANT, ball)


def test_twins_are_told_apart_by_their_adjectives() -> None:
    for seed in SEEDS:
        story, _, _, ball = _story(seed)
        story.things.append(Entity(BALL, "it", known=True, adjective=lex.COLOURS[1]))
        assert "red ball" in story.describe(ball)


def test_no_pronoun_after_a_first_object() -> None:
    for seed in SEEDS:
        story, anna, tom, ball = _story(seed)
        story.emit(story.clause(anna, lex.SEE, ball))
        story.tell(anna, lex.GIVE, tom, ball, form="past")
        assert "ball" in story.sentences[-1]
        assert story.happenings[-1].thing is ball
        assert story.happenings[-1].others == (tom,)


def test_where_is_answered_by_the_state() -> None:
    for seed in SEEDS:
        story, anna, _, ball = _story(seed)
        ball.spot = Spot("under", story.furniture[1])
        assert questions.where(story)
        assert story.sentences[0].startswith("Where is ")
        assert story.sentences[1].endswith(" is under the bed.")
        ball.spot, ball.holder = None, anna
        assert questions.where(story)
        assert story.sentences[3].startswith(("Anna has ", "She has "))


def test_yes_and_no_follow_the_state() -> None:
    answers = set()
    for seed in SEEDS:
        story, _, _, ball = _story(seed)
        ball.spot = Spot("on", story.furniture[0])
        assert questions.is_it_there(story)
        asked = "on the table" in story.sentences[0]
        assert story.sentences[1] == ("Yes, it is." if asked else "No, it isn't.")
        answers.add(asked)
        if not asked:
            assert story.sentences[2].endswith(" is on the table.")
    assert answers == {True, False}


def test_what_happened_is_asked_about_as_it_was() -> None:
    for seed in SEEDS:
        story, anna, _, ball = _story(seed)
        story.tell(anna, lex.TAKE, ball, form="past")
        assert questions.who_did(story)
        assert story.sentences[-2].startswith("Who took ")
        assert story.sentences[-1] == "Anna did."
        assert questions.what_did(story)
        assert story.sentences[-2] in ("What did she take?", "What did Anna take?")
        assert "ball" in story.sentences[-1] or story.sentences[-1].endswith(" took it.")


def test_a_known_place_is_what_someone_knows() -> None:
    seen = set()
    for seed in SEEDS:
        story, _, _, ball = _story(seed)
        ball.spot = Spot("on", story.furniture[0])
        if remarks.knows(story):
            words = story.sentences[-1].split()
            seen.add("where" in words)
            if "where" in words:
                assert words[-1] == "is."  # no inversion in the embedded question
            else:
                assert story.sentences[-1].endswith("is on the table.")
    assert seen == {True, False}

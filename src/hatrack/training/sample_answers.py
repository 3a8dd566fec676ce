"""Held-out questions answered while a run goes on, and whether answers end by themselves once it is done.

Short, and with the likeliest words alone: no random number is drawn, and the model is as it was afterwards.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from hatrack.base.load import Base
from hatrack.check.running import end_not_learned
from hatrack.console import say
from hatrack.data.limit import position_limit
from hatrack.data.render import TokenRows
from hatrack.errors import short_repr
from hatrack.inference.generate import all_end_tokens
from hatrack.inference.hat import Hat
from hatrack.training.callbacks import MetricsFile

QUESTIONS, TOKENS, SECONDS = 2, 40, 3.0
"""How many are asked at each evaluation, and the most that an answer takes."""
SHARE, FREE = 0.05, 5.0
"""Of a run's time for answers on the way, beside so many seconds; at the end there always are some."""
LONGEST = 512
"""Tokens of a question that is asked: longer ones take their time."""


@dataclass(frozen=True)
class Question:
    """What stands before an answer of a row, `prompt` (n,), and the `answer` (m,) that the row has, with its end."""

    row: int
    prompt: np.ndarray
    answer: np.ndarray


def find_questions(rows: TokenRows, count: int, longest: int = LONGEST) -> list[Question]:
    """The last question and answer of the first `count` rows that have any, and are not too long or cut."""
    found: list[Question] = []
    for index in range(len(rows)):
        ids, learn, _ = rows.row(index)
        starts = np.flatnonzero(learn[1:] & ~learn[:-1]) + 1  # at 0 nothing stands before it
        if not len(starts) or starts[-1] > longest:
            continue
        start = int(starts[-1])
        found.append(Question(int(rows.rows[index]), ids[:start], ids[start:][learn[start:]]))
        if len(found) == count:
            break
    return found


class SampleAnswers(TrainerCallback):  # type: ignore[misc]
    """At each evaluation has the first held-out questions answered: said aloud, and kept in metrics.jsonl."""

    def __init__(self, held_out: TokenRows, base: Base, ends: list[int], metrics: MetricsFile) -> None:
        self.asked, self.base, self.ends, self.metrics = find_questions(held_out, QUESTIONS), base, ends, metrics
        self.began, self.took = time.monotonic(), 0.0

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = time.monotonic()
        too_much = self.took > FREE + SHARE * (now - self.began) and state.global_step < state.max_steps
        if not self.asked or too_much or not state.is_world_process_zero:
            return
        try:
            answers = [self._answer(model, question) for question in self.asked]
        except Exception as error:  # whatever keeps a model from generating, it can be trained all the same
            say(f"no held-out question is answered on the way: {_first_line(error)}")
            self.asked = []
            return
        self.took += time.monotonic() - now
        self.metrics.write(state, {"answers": answers})
        for answer in answers:
            going_on = "" if answer["ended"] else " ..."
            say(f"  row {answer['row']}, {_last_line(answer['prompt'])}: {short_repr(answer['answer'])}{going_on}")

    def _answer(self, model: Any, question: Question) -> dict[str, Any]:
        tokenizer, ids = self.base.tokenizer, generate_answer(model, question.prompt, self.ends, self.base, TOKENS)
        said, wanted = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids, question.answer))
        prompt = tokenizer.decode(question.prompt, skip_special_tokens=True)
        ended = bool(ids) and ids[-1] in self.ends
        return {"row": question.row, "prompt": prompt, "answer": said, "wanted": wanted, "ended": ended}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _last_line(prompt: str) -> str:
    """The words of a question that tell it from others: its last line but for the name of who is to answer."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    return short_repr(lines[-2] if len(lines) > 1 else lines[-1] if lines else "")


@torch.no_grad()
def generate_answer(model: Any, prompt: np.ndarray, ends: list[int], base: Base, most: int) -> list[int]:
    """The likeliest tokens after `prompt` (n,), the one that ends them included; `most` at most, and no more than the
    model takes."""
    limit = position_limit(base.model.config.to_dict())
    most = min(most, limit - len(prompt)) if limit else most
    if most < 1:
        return []
    ids = torch.tensor(np.array([prompt]), dtype=torch.long, device=base.device)
    was_training, pad = model.training, base.tokenizer.pad_token_id
    model.eval()
    try:
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=most,
            max_time=SECONDS,
            eos_token_id=ends or None,
            pad_token_id=pad if pad is not None else base.tokenizer.eos_token_id,
        )
    finally:
        model.train(was_training)
    return [int(token) for token in found[0, ids.shape[1] :]]


def check_answers_end(hat: Hat, learned: TokenRows, tokens: tuple[int, ...]) -> None:
    """Advises where the answers to learn end with one of `tokens`, and those of the trained adapter do not end.

    Asks for the shortest answer that was learned. Costs one pass, and where that does not settle it a short answer.
    """
    if not tokens or hat.mapped_layers is not None:  # each pass over a base on disk takes as long as a step
        return
    asked = [each for each in find_questions(learned, 50) if each.answer[-1] in tokens]
    if not asked:
        return
    shortest = min(asked, key=lambda each: len(each.answer))
    ends = all_end_tokens(hat.base, tokens)
    try:
        likely = _end_likely(hat, shortest, tokens)
        if likely >= 0.5:
            return
        said = generate_answer(hat.model, shortest.prompt, ends, hat.base, min(len(shortest.answer) + 24, 2 * TOKENS))
    except Exception as error:  # the adapter is trained and proven: this is no reason to lose it
        say(f"whether answers end by themselves could not be found out: {_first_line(error)}")
        return
    if said and said[-1] not in ends:
        end = hat.base.tokenizer.decode([int(shortest.answer[-1])])
        say(f"advice: {end_not_learned(shortest.row, end, likely, len(said))}")


@torch.no_grad()
def _end_likely(hat: Hat, question: Question, tokens: tuple[int, ...]) -> float:
    """The probability of an end where the row's answer ends."""
    whole = np.concatenate([question.prompt, question.answer[:-1]])
    ids = torch.tensor(np.array([whole]), dtype=torch.long, device=hat.base.device)
    logits = hat.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    return float(logits.softmax(-1)[list(tokens)].sum())

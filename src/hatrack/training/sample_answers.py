"""Answers held-out questions during training; checks afterwards that answers end.

Answers are short and greedy: no random number is drawn, and the model is left unchanged.
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
"""Questions per evaluation, and the maximum tokens and seconds of an answer."""
SHARE, FREE = 0.05, 5.0
"""Answers may take this share of a run's time plus this many seconds. After the last step they are always generated."""
MAX_PROMPT = 512
"""Maximum tokens of a question; answering a longer one would take too long."""


@dataclass(frozen=True)
class Question:
    """A row's tokens up to an answer, `prompt` (n,), and its `answer` (m,) with its end token. `row`: its number."""

    row: int
    prompt: np.ndarray
    answer: np.ndarray


def find_questions(rows: TokenRows, count: int, longest: int = MAX_PROMPT) -> list[Question]:
    """Returns each row's last question and answer: the first `count` with a question of at most `longest` tokens."""
    found: list[Question] = []
    for index in range(len(rows)):
        ids, learn, _ = rows.row(index)
        starts = np.flatnonzero(learn[1:] & ~learn[:-1]) + 1  # an answer at 0 has no question
        if not len(starts) or starts[-1] > longest:
            continue
        start = int(starts[-1])
        found.append(Question(int(rows.row_numbers[index]), ids[:start], ids[start:][learn[start:]]))
        if len(found) == count:
            break
    return found


class SampleAnswers(TrainerCallback):  # type: ignore[misc]
    """Answers the first held-out questions at each evaluation; shows and logs the answers."""

    def __init__(self, held_out: TokenRows, base: Base, ends: list[int], metrics: MetricsFile) -> None:
        self.asked, self.base, self.ends, self.metrics = find_questions(held_out, QUESTIONS), base, ends, metrics
        self.began, self.took = time.monotonic(), 0.0

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        now = time.monotonic()
        is_too_slow = self.took > FREE + SHARE * (now - self.began) and state.global_step < state.max_steps
        if not self.asked or is_too_slow or not state.is_world_process_zero:
            return
        try:
            answers = [self._answer(model, question) for question in self.asked]
        except Exception as error:  # a model that cannot generate can still be trained
            say(f"held-out questions are not answered: {_first_line(error)}")
            self.asked = []
            return
        self.took += time.monotonic() - now
        self.metrics.write(state, {"answers": answers})
        for answer in answers:
            rest = "" if answer["ended"] else " ..."
            say(f"  row {answer['row']}, {_last_line(answer['prompt'])}: {short_repr(answer['answer'])}{rest}")

    def _answer(self, model: Any, question: Question) -> dict[str, Any]:
        tokenizer, ids = self.base.tokenizer, generate_answer(model, question.prompt, self.ends, self.base, TOKENS)
        said, wanted = (tokenizer.decode(part, skip_special_tokens=True).strip() for part in (ids, question.answer))
        prompt = tokenizer.decode(question.prompt, skip_special_tokens=True)
        ended = bool(ids) and ids[-1] in self.ends
        return {"row": question.row, "prompt": prompt, "answer": said, "wanted": wanted, "ended": ended}


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _last_line(prompt: str) -> str:
    """The last line of a question, without the line that names who answers."""
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    return short_repr(lines[-2] if len(lines) > 1 else lines[-1] if lines else "")


@torch.no_grad()
def generate_answer(model: Any, prompt: np.ndarray, ends: list[int], base: Base, most: int) -> list[int]:
    """Generates greedily after `prompt` (n,) until one of `ends`, which is included. Stops at `most` tokens or at the
    model's position limit."""
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


def check_end_token_learned(hat: Hat, learned: TokenRows, tokens: tuple[int, ...]) -> None:
    """Prints advice if the answers in the data end with one of `tokens`, but the trained adapter's answers do not end.

    Tests the shortest answer in the data. Costs one forward pass, and a short generation if the end token is unlikely.
    """
    if not tokens or hat.mapped_layers is not None:  # each pass over a base on disk takes as long as a step
        return
    asked = [each for each in find_questions(learned, 50) if each.answer[-1] in tokens]
    if not asked:
        return
    shortest = min(asked, key=lambda each: len(each.answer))
    ends = all_end_tokens(hat.base, tokens)
    try:
        likely = _end_probability(hat, shortest, tokens)
        if likely >= 0.5:
            return
        said = generate_answer(hat.model, shortest.prompt, ends, hat.base, min(len(shortest.answer) + 24, 2 * TOKENS))
    except Exception as error:  # a failed check must not lose a trained and verified adapter
        say(f"it could not be checked that answers end: {_first_line(error)}")
        return
    if said and said[-1] not in ends:
        end = hat.base.tokenizer.decode([int(shortest.answer[-1])])
        say(f"advice: {end_not_learned(shortest.row, end, likely, len(said))}")


@torch.no_grad()
def _end_probability(hat: Hat, question: Question, tokens: tuple[int, ...]) -> float:
    """The probability of `tokens` at the end of the row's answer."""
    whole = np.concatenate([question.prompt, question.answer[:-1]])
    ids = torch.tensor(np.array([whole]), dtype=torch.long, device=hat.base.device)
    logits = hat.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1].float()
    return float(logits.softmax(-1)[list(tokens)].sum())

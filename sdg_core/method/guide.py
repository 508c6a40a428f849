"""The correction: guided denoised = denoised + sigma^2 / alpha * grad F, for any model and sampler (Tweedie)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .controls import SOFT, Crop
from .device import Span, beside, brought
from .features import Encoder, reads_noise
from .gradient import Sight, Target
from .precision import added
from .references import Batch
from .report import cosines_of, sizes_of
from .run import GuidanceRun, Kept, StepTrace
from .schedule import MIN_ALPHA, Convention, expand
from .strength import Bounded, Strength, bounded, rms

LEAST_DISTANCE = 1e-3
"""A score nearer to the best one than this counts as this near, where distances are compared."""


def guide(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor:
    """The guided estimate of x_0.

    denoised, x_t: (B, C, H, W), or videos (B, C, T, H, W), in the model's own scaling; sigma: (B,). Returns
    ``denoised`` itself, untouched, where every scale is 0. Otherwise a new tensor of denoised's dtype:

        denoised' = denoised + sigma^2 / alpha * grad_{x_t} F        (absolute strength, before the cap)
    """
    shift = guidance_shift(denoised, x_t, sigma, run)
    return denoised if shift is None else added(denoised, shift)


def guidance_shift(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun) -> Tensor | None:
    """What ``guide`` adds, in the precision of x_t, at least float32, or None where there is nothing to add."""
    with run.timed(denoised.device) as model:
        return _shift(denoised, x_t, sigma, run, model)


def _shift(denoised: Tensor, x_t: Tensor, sigma: Tensor, run: GuidanceRun, model: Span | None = None) -> Tensor | None:
    batch = Batch.of(denoised, x_t, sigma)
    weights = run.weights(batch.sigma, batch.frame, batch.frames)
    if not bool((weights != 0).any()):
        return None
    pull = _pull(batch, weights, run)
    shift, made = _sized(pull, batch, weights, run)
    run.trace.append(
        StepTrace(
            float(batch.sigma[0]),
            pull.scores,
            shift.pull,
            shift.capped,
            shift.broken,
            weights != 0,
            sizes_of(made, *weights.shape),
            cosines_of(pull.own, *weights.shape),
            tuple(map(tuple, pull.spans)),
            model,
        )
    )
    if denoised.device.type == "cpu":  # reading costs nothing there
        run.warn()
    return batch.unfold(shift.shift)


def _sized(pull: Pull, batch: Batch, weights: Tensor, run: GuidanceRun) -> tuple[Bounded, dict[int, Tensor]]:
    """The shift of denoised at its final size, and the RMS (B,) that each term has in it, over the model's step."""
    room, full, strength = run.room(batch, weights), run.fullness(batch, weights), run.strength
    alpha, s = (expand(v, batch.x_t) for v in (run.convention.alpha(batch.sigma), batch.sigma))
    usable = alpha > MIN_ALPHA
    alpha = torch.where(usable, alpha, torch.ones_like(alpha))

    def shifted(grad: Tensor) -> Tensor:
        return torch.where(usable, s.square() / alpha * grad, torch.zeros_like(grad))

    shift = shifted(pull.grad)
    step = rms((batch.x_t - alpha * batch.denoised) / alpha)  # sigma / alpha * eps: the model's own step
    free = torch.ones_like(step)
    broken = torch.zeros_like(step, dtype=torch.bool)
    variance = run.variance
    if pull.aimed is not None:  # goals size their part of the shift: only the cap is left for them
        shift, _, _, free, broken = bounded(shift, step, strength, variance, room, full)
        shift = shift + shifted(pull.aimed)
        full, strength, variance = None, Strength("absolute", strength.cap), math.inf
    made = bounded(shift, step, strength, variance, room, full)
    made = made._replace(broken=made.broken | broken)
    parts = {k: rms(shifted(part)) / step.clamp(min=torch.finfo(step.dtype).tiny) for k, part in pull.added.items()}
    return made, {k: size * made.factor * (1 if run.terms[k].aims else free) for k, size in parts.items()}


def guidance_gradient(batch: Batch, weights: Tensor, run: GuidanceRun) -> tuple[Tensor, Tensor]:
    """grad_{x_t} F (B, C, H, W) and the scores (K, B), by every encoder that has a weight (K, B) here."""
    pull = _pull(batch, weights, run)
    return pull.grad if pull.aimed is None else pull.grad + pull.aimed, pull.scores


@dataclass
class Pull:
    """grad_{x_t} F (B, C, H, W) of the terms that count by their scales, of those that aim at a goal, and all scores
    (K, B).

    ``own``: the gradients (B, C, H, W) of terms that are known by themselves; ``added``: what of them is in the sums,
    where blends changed them. ``spans`` (K): when each term's passes ran.
    """

    grad: Tensor
    scores: Tensor
    spans: list[list[Span]]
    aimed: Tensor | None = None
    own: dict[int, Tensor] = field(default_factory=dict)
    added: dict[int, Tensor] = field(default_factory=dict)


def _pull(batch: Batch, weights: Tensor, run: GuidanceRun) -> Pull:
    apart = [k for k, term in enumerate(run.terms) if term.apart and bool((weights[k] != 0).any())]
    scores = torch.zeros(weights.shape, dtype=weights.dtype, device=batch.x_t.device)
    pull = Pull(torch.zeros_like(batch.x_t), scores, [[] for _ in weights])
    _pull_together(pull, batch, _without(weights, apart), run)
    _pull_apart(pull, apart, batch, weights, run)
    return pull


def _pull_together(pull: Pull, batch: Batch, weights: Tensor, run: GuidanceRun) -> None:
    """Adds the terms that share a pass with all others of their encoder."""
    for encoder, members, rows in run.active(weights, batch):
        some, seen = weights[members][:, rows], batch.take(rows)
        there = beside(rows, batch.x_t)
        begun = run.now(batch.x_t.device)
        grad, part_scores = _encoder_gradient(encoder, members, seen, some, run)
        part = _of_x_t(encoder, grad, seen, run)
        pull.grad[there] += part
        for k, score in zip(members, part_scores, strict=True):
            pull.scores[k][there] = score.to(pull.scores)
        span = Span(begun, run.now(batch.x_t.device), 1 / len(members))
        for k in members:
            pull.spans[k].append(span)
        parts = {members[0]: part} if len(members) == 1 else _one_by_one(encoder, members, seen, some, run)
        for k, own in parts.items():
            pull.own.setdefault(k, torch.zeros_like(batch.x_t))[there] = own
            pull.added[k] = pull.own[k]


def _one_by_one(
    encoder: Encoder, members: list[int], batch: Batch, weights: Tensor, run: GuidanceRun
) -> dict[int, Tensor]:
    """The gradients of x_t of terms that share a pass, each from a pass of its own, if the run is to be measured so."""
    if not run.measured:
        return {}
    alone = {k: weights[i : i + 1] for i, k in enumerate(members) if bool((weights[i] != 0).any())}
    found = {k: _encoder_gradient(encoder, [k], batch, weight, run)[0] for k, weight in alone.items()}
    return {k: _of_x_t(encoder, grad, batch, run) for k, grad in found.items()}


def _pull_apart(pull: Pull, apart: list[int], batch: Batch, weights: Tensor, run: GuidanceRun) -> None:
    """Adds the terms that controls give a pass of their own."""
    parts: dict[int, Tensor] = {}
    for k in apart:
        begun = run.now(batch.x_t.device)
        kept = _own_gradient(k, weights[k] != 0, batch, run)
        pull.scores[k] = kept.present
        part = pull.own[k] = _counted(k, kept, weights[k], batch, run)
        pull.spans[k].append(Span(begun, run.now(batch.x_t.device)))
        if run.terms[k].aims:
            pull.aimed = part if pull.aimed is None else pull.aimed + part
            pull.added[k] = part
        else:
            parts[k] = part
    for k, part in _blended(parts, weights, run).items():
        pull.grad += part
        pull.added[k] = part


def _blended(parts: dict[int, Tensor], weights: Tensor, run: GuidanceRun) -> dict[int, Tensor]:
    """The parts (B, C, H, W) of terms k, those that share a blend brought together by it."""
    groups: dict[int, list[int]] = {}
    for k in parts:
        blend = run.terms[k].blend
        groups.setdefault(-1 - k if blend is None else id(blend), []).append(k)
    found: dict[int, Tensor] = {}
    for members in groups.values():
        blend = run.terms[members[0]].blend
        if blend is None or len(members) == 1:
            found |= {k: parts[k] for k in members}
            continue
        shares = torch.stack([weights[k] / run.terms[k].scale * run.terms[k].share for k in members])
        together = torch.stack([parts[k] for k in members])
        found |= dict(zip(members, blend(together, brought(shares.to(together.dtype), together)).unbind(), strict=True))
    return found


def _counted(k: int, kept: Kept, weight: Tensor, batch: Batch, run: GuidanceRun) -> Tensor:
    """What a term's own gradient adds (B, C, H, W): times what it counts, inside its mask."""
    term = run.terms[k]
    own = _of_x_t(term.encoder, kept.grad, batch, run, kept.finished if term.aims else None)
    mask = batch.mask(term, (own.shape[-2], own.shape[-1]))
    part = own if mask is None else mask * own
    slope = (own * part).flatten(1).sum(dim=1)
    return expand(_amount(k, weight, kept, slope, batch, run), own) * part


def _amount(k: int, weight: Tensor, kept: Kept, slope: Tensor, batch: Batch, run: GuidanceRun) -> Tensor:
    """What the own gradient g of term k counts (B,): its weight (B,), or what its goal asks for.

    A shift d = sigma^2 / alpha * a * g of denoised moves the score by c (g . d): c = alpha where x_t is read, and
    1 / f = (alpha^2 v + sigma^2) / (alpha v) where denoised is, because g = f dF / d denoised. ``slope``: g . g (B,),
    inside the mask. So a = lift * alpha / (c sigma^2 slope).
    """
    term = run.terms[k]
    if term.goal is None:
        return weight
    best = term.guidance.best
    gap = term.goal.gap(kept.present, best, term.scale)
    weight = brought(weight, gap)
    if not term.goal.adapted:
        return weight * (gap / SOFT).clamp(0, 1)
    alpha, square = run.convention.alpha(batch.sigma), batch.sigma.square()
    moved = (alpha.square() * run.variance + square) / (alpha * run.variance)
    if reads_noise(term.encoder):
        moved = torch.where(brought(kept.finished, moved), moved, alpha)
    alpha, moved, square = (brought(v, slope) for v in (alpha, moved, square))
    rise = moved * square * slope
    memory = run.memory(k)
    alike = (best - kept.score) / (best - kept.present).clamp(min=LEAST_DISTANCE)  # scores under noise count otherwise
    lift = alike * memory.pulled(gap, weight != 0) / memory.realised(float(batch.sigma.max()))
    wanted = weight / abs(term.scale) * lift * alpha / rise.clamp(min=torch.finfo(rise.dtype).tiny)
    return torch.where(rise > 0, wanted, torch.zeros_like(wanted))


def _without(weights: Tensor, apart: list[int]) -> Tensor:
    """Weights (K, B) of the terms that share their pass."""
    return weights.index_fill(0, torch.tensor(apart), 0.0) if apart else weights


def _own_gradient(k: int, wanted: Tensor, batch: Batch, run: GuidanceRun) -> Kept:
    """The gradient of one term by itself, of what its encoder reads, without its weight, where ``wanted`` (B,).

    The gradient last taken serves again where no new one is due. Towards a goal an encoder of noise reads the model's
    estimate where that is good enough, see ``Goal``.
    """
    memory, level = run.memory(k), float(batch.sigma.max())
    kept = memory.find(level, wanted, batch.x_t.shape, run.every(k, level))
    if kept is None:
        run.gradients += 1
        term, crops = run.terms[k], run.crops(k, batch)
        grad, weights = torch.zeros_like(batch.x_t), run.only(k, wanted)
        score = grad.new_zeros(len(grad))
        finished = torch.zeros_like(wanted)
        for encoder, members, rows in run.active(weights, batch):
            seen, ones, there = batch.take(rows), weights[members][:, rows], beside(rows, grad)
            if term.aims and reads_noise(encoder) and run.is_readable(seen):
                part, scores = _finished_gradient(k, seen, ones, run)
                grad[there], score[there] = part.to(grad), scores[0].to(score)
                finished[beside(rows, finished)] = True
                continue
            for crop in crops:
                part, scores = _encoder_gradient(encoder, members, seen, ones, run, crop)
                grad[there] += part.to(grad) / len(crops)
                score[there] += scores[0].to(score) / len(crops)
        present, early = score, wanted & ~finished
        if term.aims and bool(early.any()):
            present = torch.where(brought(early, score), _present_score(k, batch, run).to(score), score)
        kept = memory.keep(level, Kept(grad, score, wanted, present, finished))
    return kept


def _finished(k: int, batch: Batch, run: GuidanceRun) -> tuple[Sight, Target]:
    """How term k sees the model's estimate as a finished picture: an encoder of noise reads it at its least noise."""
    term, encoder = run.terms[k], run.terms[k].encoder
    view = run.view_of(encoder)
    ratio = encoder.table.ratio[:1].to(batch.sigma) if reads_noise(encoder) else None
    window = run.references.window(term, view, batch, ratio)
    (target,) = run.references.targets([k], run.terms, view, batch, ratio)
    return Sight(view, torch.ones_like(batch.sigma), torch.zeros_like(batch.sigma[:1]), window), target


def _finished_gradient(k: int, batch: Batch, weights: Tensor, run: GuidanceRun) -> tuple[Tensor, Tensor]:
    """The gradient of term k's score of the model's estimate, of that estimate, and the score (1, B)."""
    term = run.terms[k]
    sight, target = _finished(k, batch, run)
    return run.chunks.gradient(term.encoder, [term], weights, [target], batch.denoised, sight)


@torch.no_grad()
def _present_score(k: int, batch: Batch, run: GuidanceRun) -> Tensor:
    """The score (B,) of the model's estimate as a finished picture.

    Under much noise every picture is like every other, so a goal can't go by the score of x_t.
    """
    term = run.terms[k]
    sight, target = _finished(k, batch, run)
    picture = sight.view.picture(batch.denoised, torch.ones_like(batch.sigma))
    return target.score(term.guidance, sight.features(term.encoder, picture, term.guidance.depth(term.encoder)))


def _of_x_t(encoder: Encoder, grad: Tensor, batch: Batch, run: GuidanceRun, finished: Tensor | None = None) -> Tensor:
    """The gradient of x_t from that of what an encoder reads: x_t in its own scaling (SNR matching), or denoised, where
    encoders of noise do so only in the samples ``finished`` (B,).

    The gradient of a score of denoised, G, counts as alpha v / (alpha^2 v + sigma^2) G, so that Tweedie's sigma^2 /
    alpha turns it into the posterior variance, which is exact for Gaussian data of variance v per element.
    """
    x, sigma = batch.x_t, batch.sigma
    norm = None
    if reads_noise(encoder):
        norm = encoder_noise(encoder, run.view_of(encoder).size(*x.shape[-2:]), sigma, run.convention)[1]
        if finished is None:
            return grad / expand(norm, x)
    alpha = run.convention.alpha(sigma)
    factor = alpha * run.variance / (alpha.square() * run.variance + sigma.square())
    if norm is not None and finished is not None:
        factor = torch.where(brought(finished, factor), factor, 1 / norm)
    return grad * expand(factor, x)


def _encoder_gradient(
    encoder: Encoder, members: list[int], batch: Batch, weights: Tensor, run: GuidanceRun, crop: Crop | None = None
) -> tuple[Tensor, Tensor]:
    """The part of one encoder, at one noise level: of what it reads, x_t in its own scaling or denoised."""
    view, x, sigma = run.view_of(encoder), batch.x_t, batch.sigma
    terms = [run.terms[k] for k in members]
    if not reads_noise(encoder):
        seen = run.references.window(terms[0], view, batch, None)
        sight = Sight(view, torch.ones_like(sigma), torch.zeros_like(sigma[:1]), seen, crop)
        targets = run.references.targets(members, run.terms, view, batch, None, crop)
        return run.chunks.gradient(encoder, terms, weights, targets, batch.denoised, sight)
    ratio, norm = encoder_noise(encoder, view.size(*x.shape[-2:]), sigma, run.convention)
    seen = run.references.window(terms[0], view, batch, ratio[:1])
    sight = Sight(view, run.convention.alpha(sigma) / norm, encoder.table.timestep(ratio[:1]), seen)
    targets = run.references.targets(members, run.terms, view, batch, ratio[:1])
    return run.chunks.gradient(encoder, terms, weights, targets, x / expand(norm, x), sight)


def encoder_noise(
    encoder: Encoder, size: tuple[int, int], sigma: Tensor, convention: Convention
) -> tuple[Tensor, Tensor]:
    """SNR matching: the noise ratio (B,) that the encoder sees, and the divisor (B,) that takes x_t to its VP scaling.

    An encoder that averages g-times-smaller noise out of a larger picture, ``size`` (h, w), sees sigma / alpha * g.
    """
    alpha = convention.alpha(sigma).clamp(min=MIN_ALPHA)
    ratio = sigma / alpha * encoder.noise_gain(*size)
    return ratio, alpha * (1 + ratio.square()).sqrt()

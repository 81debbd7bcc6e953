"""The method in plain loops over numpy float64, one row at a time, written from the paper and nothing else."""

import math

import numpy as np


def softmax(x: np.ndarray, sink: float | None = None, cap: float | None = None) -> np.ndarray:
    """Return the weights of logits [N], in which a sink takes its part, after a soft cap."""
    if cap is not None:
        x = np.array([cap * math.tanh(logit / cap) for logit in x])
    top = max(x.max(), x.max() if sink is None else sink)
    e = np.exp(x - top)
    return np.asarray(e / (e.sum() + (0.0 if sink is None else math.exp(sink - top))))


def dense(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    sinks: np.ndarray | None = None,
    cap: float | None = None,
) -> np.ndarray:
    """Return causal attention of the last T of S tokens: query [Hq, T, D], keys, values [Hkv, S, D] -> [Hq, T, D]."""
    num_heads, num_tokens, head_dim = query.shape
    group, past = num_heads // keys.shape[0], keys.shape[1] - num_tokens
    out = np.zeros_like(query)
    for h in range(num_heads):
        for t in range(num_tokens):
            seen = past + t + 1
            logits = keys[h // group, :seen] @ query[h, t] / math.sqrt(head_dim)
            weights = softmax(logits, None if sinks is None else sinks[h], cap)
            out[h, t] = weights @ values[h // group, :seen]
    return out


def window_scores(
    query: np.ndarray,
    keys: np.ndarray,
    window: int,
    by_peak: bool = False,
    sinks: np.ndarray | None = None,
    cap: float | None = None,
) -> np.ndarray:
    """Return the window's attention, summed or the largest: query [Hq, T, D], keys [Hkv, S, D] -> [Hkv, S]."""
    num_heads, num_tokens, head_dim = query.shape
    group, total = num_heads // keys.shape[0], keys.shape[1]
    scores = np.zeros(keys.shape[:2])
    for h in range(num_heads):
        for i in range(window):
            seen = total - window + i + 1
            logits = keys[h // group, :seen] @ query[h, num_tokens - window + i] / math.sqrt(head_dim)
            sink = None if sinks is None else sinks[h]
            given, so_far = softmax(logits, sink, cap), scores[h // group, :seen]
            scores[h // group, :seen] = np.maximum(so_far, given) if by_peak else so_far + given
    return scores


def pooled(scores: np.ndarray, window: int, before: int, after: int) -> np.ndarray:
    """Give each score to so many tokens before and after its own, without the window: [Hkv, S] -> [Hkv, S - window]."""
    rows = scores[:, : scores.shape[1] - window]
    return np.array([[row[max(0, i - after) : i + before + 1].max() for i in range(len(row))] for row in rows])


def spread(keys: np.ndarray, run: int) -> np.ndarray:
    """Add up the ranges of whole runs of `run` tokens, or take the range of all if there is none: [N, D] -> [D]."""
    total = np.zeros(keys.shape[1])
    ends = range(run, len(keys) + 1, run) if len(keys) >= run else [len(keys)]
    for end in ends:
        for c in range(keys.shape[1]):
            part = keys[max(0, end - run) : end, c]
            total[c] += part.max() - part.min()
    return total


def hybrid_token_scores(
    query: np.ndarray, keys: np.ndarray, page_size: int, num_channels: int, spread: np.ndarray | float = 1.0
) -> np.ndarray:
    """Return one KV head's approximate attention: query [G, D], keys [N, D], spread [D] -> [N]."""
    head_dim = query.shape[1]
    channels = np.argsort(-np.abs(query).mean(0) * spread, kind="stable")[:num_channels]
    positive = query.sum(0) > 0
    scores = np.zeros(len(keys))
    for q in query:
        logits = np.zeros(len(keys))
        share = (np.abs(q) * spread)[channels].sum() / (np.abs(q) * spread).sum()
        for start in range(0, len(keys), page_size):
            page = keys[start : start + page_size]
            bound = np.where(positive, page.max(0), page.min(0))
            logits[start : start + page_size] = (q[channels] @ bound[channels]) / math.sqrt(head_dim * share)
        scores += softmax(logits) / len(query)
    return scores


def quest_token_scores(query: np.ndarray, keys: np.ndarray, page_size: int) -> np.ndarray:
    """Return Quest's upper bounds as attention for one KV head: query [G, D], keys [N, D] -> [N]."""
    scores = np.zeros(len(keys))
    for q in query:
        logits = np.zeros(len(keys))
        for start in range(0, len(keys), page_size):
            page = keys[start : start + page_size]
            logits[start : start + page_size] = np.maximum(q * page.max(0), q * page.min(0)).sum()
        scores += softmax(logits / math.sqrt(query.shape[1])) / len(query)
    return scores


def lowbit_logits(query: np.ndarray, keys: np.ndarray, num_channels: int, group: int, spread: np.ndarray) -> np.ndarray:
    """Return logits by 4-bit keys, per channel of `group` tokens, the last few exact: query [G, D], keys [N, D]."""
    channels = np.argsort(-np.abs(query).sum(0) * spread, kind="stable")[:num_channels]
    near = keys.copy()
    for start in range(0, len(keys) // group * group, group):
        for c in range(keys.shape[1]):
            part = keys[start : start + group, c]
            step = (part.max() - part.min()) / 15
            near[start : start + group, c] = part.min() + step * np.round((part - part.min()) / step if step else 0)
    return np.asarray(query[:, channels] @ near[:, channels].T)


def lowbit_token_scores(query: np.ndarray, keys: np.ndarray, num_channels: int) -> np.ndarray:
    """Return one KV head's approximate attention by keys in 4 bits: query [G, D], keys [N, D] -> [N].

    Channels are chosen by what stood before the last token.
    """
    logits = lowbit_logits(query, keys, num_channels, 64, spread(keys[:-1], 64)) / math.sqrt(query.shape[1])
    return np.asarray(np.mean([softmax(row) for row in logits], axis=0))


def choose(scores: np.ndarray, top_k: int, sinks: int = 0, recents: int = 0) -> list[int]:
    """Return the pinned tokens, then the best; of equal scores the earlier token wins."""
    count = len(scores)
    pinned = [i for i in range(count) if i < sinks or i >= count - recents]
    rest = sorted((i for i in range(count) if i not in pinned), key=lambda i: (-scores[i], i))
    return sorted([*pinned, *rest][:top_k])


def attend(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    chosen: list[int],
    sinks: np.ndarray | None = None,
    cap: float | None = None,
) -> np.ndarray:
    """Return exact attention to the chosen tokens for one KV head: query [G, D], keys, values [N, D] -> [G, D]."""
    out = []
    for g, q in enumerate(query):
        logits = keys[chosen] @ q / math.sqrt(query.shape[1])
        out.append(softmax(logits, None if sinks is None else sinks[g], cap) @ values[chosen])
    return np.stack(out)

"""Calls that hide their products, taken apart: recurrent layers, multi-head attention, bags of embeddings.

What they do with parameters becomes F.linear or F.embedding, which the recorder sees; results are those of PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def own_body(function: Callable) -> Callable:
    """PyTorch's own code of a function, without the question at its top whether a mode wants the call whole."""
    code = FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda arguments: False},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    code.__kwdefaults__ = function.__kwdefaults__
    return code


_attention = own_body(F.multi_head_attention_forward)


def attention(mode: Any, *args, **kwargs):
    """F.multi_head_attention_forward with the mode on inside."""
    with mode:
        return _attention(*args, **kwargs)


def recurrent(step: Callable, cells: int):
    """torch.lstm, torch.gru, torch.rnn_tanh or torch.rnn_relu; ``cells`` is 2 where the state has two parts.

    A pass without gradients finds all hidden states h; one F.linear(h) then stands for the products of all times: it
    gives the values, and the second pass adds to it W h - (W h without gradient), which is zero and carries the
    gradient from one time to the next.
    """

    def forward(mode: Any, data, state, weights, biases, layers, dropout, train, bidirectional, batch_first):
        states = state if isinstance(state, tuple | list) else (state,)
        x = data.transpose(0, 1) if not batch_first and data.ndim == 3 else data
        single = x.ndim == 2
        x = x[None] if single else x
        states = [part[:, None] if single else part for part in states]
        directions = 2 if bidirectional else 1
        per = len(weights) // (layers * directions)
        ends: list[list[Tensor]] = [[] for _ in states]
        for layer in range(layers):
            parts = []
            for direction in range(directions):
                number = layer * directions + direction
                own = _weights(weights[number * per : (number + 1) * per], biases)
                start = [part[number] for part in states]
                flow, last = _run(mode, step, x.flip(1) if direction else x, start, own)
                parts.append(flow.flip(1) if direction else flow)
                for place, end in zip(ends, last, strict=True):
                    place.append(end)
            x = torch.cat(parts, 2) if directions == 2 else parts[0]
            if dropout and train and layer + 1 < layers:
                x = F.dropout(x, dropout)
        finals = [torch.stack(part) for part in ends]
        if single:
            x, finals = x[0], [part[:, 0] for part in finals]
        elif not batch_first:
            x = x.transpose(0, 1)
        return (x, *finals[:cells])

    return forward


def _weights(parts, biases: bool) -> tuple:
    """Weights and biases of input and state, and the projection of the state or None."""
    w_input, w_state, *rest = parts
    b_input, b_state = (rest.pop(0), rest.pop(0)) if biases else (None, None)
    return w_input, w_state, b_input, b_state, rest[0] if rest else None


def _run(mode: Any, step: Callable, x: Tensor, start: list[Tensor], weights: tuple) -> tuple[Tensor, list[Tensor]]:
    w_input, w_state, b_input, b_state, project = weights
    with mode:
        of_input = F.linear(x, w_input, b_input)
    with torch.no_grad():
        states, before, raw = list(start), [], []
        for i in range(x.shape[1]):
            before.append(states[0])
            states = list(step(of_input[:, i], F.linear(states[0], w_state, b_state), states))
            if project is not None:
                raw.append(states[0])
                states[0] = F.linear(states[0], project)
    with mode:
        of_state = F.linear(torch.stack(before, 1), w_state, b_state)
        projected = F.linear(torch.stack(raw, 1), project) if project is not None else None
    w_state, project = w_state.detach(), None if project is None else project.detach()
    states, flow = list(start), []
    for i in range(x.shape[1]):
        carried = F.linear(states[0], w_state)
        gates = of_state[:, i] + (carried - carried.detach())
        states = list(step(of_input[:, i], gates, states))
        if projected is not None:
            carried = F.linear(states[0], project)
            states[0] = projected[:, i] + (carried - carried.detach())
        flow.append(states[0])
    return torch.stack(flow, 1), states


def _lstm_step(left: Tensor, right: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
    enter, forget, new, leave = (left + right).chunk(4, -1)
    cell = torch.sigmoid(forget) * states[1] + torch.sigmoid(enter) * torch.tanh(new)
    return torch.sigmoid(leave) * torch.tanh(cell), cell


def _gru_step(left: Tensor, right: Tensor, states: list[Tensor]) -> tuple[Tensor, ...]:
    (r, z, n), (hr, hz, hn) = left.chunk(3, -1), right.chunk(3, -1)
    keep = torch.sigmoid(z + hz)
    new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
    return (new + keep * (states[0] - new),)


def _simple_step(function: Callable) -> Callable:
    return lambda left, right, states: (function(left + right),)


_LAYERS = {
    torch.lstm: recurrent(_lstm_step, 2),
    torch.gru: recurrent(_gru_step, 1),
    torch.rnn_tanh: recurrent(_simple_step(torch.tanh), 1),
    torch.rnn_relu: recurrent(_simple_step(torch.relu), 1),
}
_CELLS = {
    torch.lstm_cell: _lstm_step,
    torch.gru_cell: _gru_step,
    torch.rnn_tanh_cell: _simple_step(torch.tanh),
    torch.rnn_relu_cell: _simple_step(torch.relu),
}


def bag(mode: Any, tokens: Tensor, weight: Tensor, average: bool, padding: int | None) -> Tensor:
    """F.embedding_bag of tokens [b, s] without offsets: sum or mean of the embeddings that are not padding."""
    with mode:
        rows = F.embedding(tokens, weight, padding)
    if padding is None:
        return rows.mean(1) if average else rows.sum(1)
    kept = (tokens != padding % len(weight)).to(rows.dtype)
    total = (rows * kept[..., None]).sum(1)
    return total / kept.sum(1, keepdim=True).clamp(min=1) if average else total


def _plain_bag(
    input, weight, offsets=None, max_norm=None, norm_type=2, scale_grad_by_freq=False, mode="mean", sparse=False,
    per_sample_weights=None, include_last_offset=False, padding_idx=None,
) -> Callable | None:  # fmt: skip
    if (
        input.ndim != 2
        or offsets is not None
        or max_norm is not None
        or per_sample_weights is not None
        or mode == "max"
    ):
        return None
    return lambda recorder: bag(recorder, input, weight, mode == "mean", padding_idx)


def taken_apart(function: Callable, args: tuple, kwargs: dict) -> Callable | None:
    """A function of the mode that makes this call out of visible ones, or None."""
    if function is F.multi_head_attention_forward:
        return lambda mode: attention(mode, *args, **kwargs)
    if function is F.embedding_bag:
        return _plain_bag(*args, **kwargs)
    if function in _LAYERS and not kwargs and not _packed(args):
        return lambda mode: _LAYERS[function](mode, *args)
    if function in _CELLS and not kwargs and len(args) >= 4:
        return lambda mode: _cell(mode, _CELLS[function], *args)
    return None


def _packed(args: tuple) -> bool:
    """Whether the second argument holds the batch sizes of packed sequences."""
    return isinstance(args[1], Tensor) and not args[1].is_floating_point()


def _cell(mode: Any, step: Callable, x, state, w_input, w_state, b_input=None, b_state=None):
    states = list(state) if isinstance(state, tuple | list) else [state]
    with mode:
        left, right = F.linear(x, w_input, b_input), F.linear(states[0], w_state, b_state)
    found = step(left, right, states)
    return found if isinstance(state, tuple | list) else found[0]

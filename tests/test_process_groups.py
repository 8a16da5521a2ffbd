"""What goes over which process group, and in what form: NCCL's rules, kept to over gloo."""

from unittest import mock

import torch
import torch.distributed as dist
from rank_pool import on_ranks
from torch import nn

from pybackdoor.distributed import Ranks

CPU, GPU = torch.device("cpu"), torch.device("meta")  # stands for one: no number can be read there


def words():
    """What ranks tell each other in a group that is said to be NCCL's alone, and how."""
    ranks, groups = Ranks.start(CPU), []

    def seen(name):
        own = getattr(dist, name)

        def call(*given, group=None, **how):
            groups.append((name, group is not None and dist.get_backend(group)))
            return own(*given, group=group, **how)

        return mock.patch.object(dist, name, call)

    alone = mock.patch.object(dist, "get_backend_config", lambda: "cuda:nccl")
    new = mock.patch.object(dist, "new_group", wraps=dist.new_group)
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    weights[ranks.rank].grad = torch.full((2,), 1.0 + ranks.rank)
    calls = [seen(name) for name in ("all_gather", "all_reduce", "broadcast_object_list")]
    with alone, new as made, calls[0], calls[1], calls[2]:
        for _ in range(2):
            numbers = ranks.agree([ranks.rank, 7.5], GPU)
        said = ranks.from_first({"rank": ranks.rank})
        ranks.sum_gradients(weights)
    Ranks.finish()
    again = dist.is_initialized()
    return numbers, said, [w.grad.tolist() for w in weights], groups, made.call_count, again


def test_words_do_not_wait_for_the_gpu():
    for numbers, said, grads, groups, made, again in on_ranks(2, words):
        assert numbers == [[0.0, 7.5], [1.0, 7.5]] and said == {"rank": 0}
        assert grads == [[1.0, 1.0], [2.0, 2.0]]
        assert groups == [
            *[("all_gather", "gloo")] * 2,
            ("broadcast_object_list", "gloo"),
            ("all_reduce", "gloo"),  # which gradients there are
            ("all_reduce", False),  # the gradients themselves
        ]
        assert made == 1 and not again


def two_groups(folder):
    """A group that is made anew has one of its own beside it."""
    told, made = [], 0
    for number in range(2):
        about = {"rank": Ranks().rank, "world_size": 2}
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/{number}", 2), **about)
        ranks = Ranks.start(CPU)
        alone = mock.patch.object(dist, "get_backend_config", lambda: "cuda:nccl")
        with alone, mock.patch.object(dist, "new_group", wraps=dist.new_group) as new:
            told.append(ranks.agree([ranks.rank], GPU))
        made += new.call_count
        Ranks.finish()
    return told, made


def test_a_later_process_group_has_its_own(tmp_path):
    for told, made in on_ranks(2, two_groups, str(tmp_path)):
        assert told == [[[0.0], [1.0]]] * 2 and made == 2


def layouts():
    """Parameters of every layout, of which each rank has other values."""
    ranks = Ranks.start(CPU)
    own = dist.broadcast

    def strict(tensor, *given, **how):
        if not tensor.is_contiguous():
            raise ValueError("Tensors must be contiguous")
        return own(tensor, *given, **how)

    model = nn.Module()
    start = torch.arange(6.0).view(2, 3) + 10 * ranks.rank
    model.turned = nn.Parameter(start.T)
    model.plain = nn.Parameter(start)
    image = torch.arange(16.0).view(1, 2, 2, 4) + 10 * ranks.rank
    last = torch.channels_last if ranks.rank else torch.contiguous_format
    model.image = nn.Parameter(image.to(memory_format=last))
    with mock.patch.object(dist, "broadcast", strict):
        ranks.same_start(model, CPU)
        sent = dict(ranks.tensors_from_first({"turned": start.T} if not ranks.rank else {}, CPU)[1])
    kept = model.turned.stride() == (1, 3) and model.image.is_contiguous(memory_format=last)
    return {n: p.detach() for n, p in model.named_parameters()}, sent["turned"], kept


def test_what_is_sent_is_contiguous():
    start = torch.arange(6.0).view(2, 3)
    for got, sent, kept in on_ranks(2, layouts):
        assert torch.equal(got["turned"], start.T) and torch.equal(got["plain"], start)
        assert torch.equal(got["image"], torch.arange(16.0).view(1, 2, 2, 4))
        assert torch.equal(sent, start.T) and kept

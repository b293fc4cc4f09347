"""The aggregator as FLARE calls it: equal weights, refusals by name, never an exception out of accept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from nvflare.apis.event_type import EventType
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from flare_toys import answer, started_aggregator, toy_state
from heterosync import pulse
from heterosync.errors import UserError
from heterosync.federation.server import Server
from heterosync.flare import messages


def test_equal_mean_whatever_the_order_and_the_sample_counts(tmp_path: Path) -> None:
    random = {
        s: {
            "w": torch.randn(2, 3) * 10**i,
            "bn.running_mean": torch.randn(3),
            "bn.num_batches_tracked": torch.tensor(3 * i),
        }
        for i, s in enumerate("abc")
    }
    results = []
    for number, order in enumerate(itertools.permutations("abc")):
        aggregator, context = started_aggregator(tmp_path / str(number))
        for site in order:
            assert aggregator.accept(answer(site, random[site], samples=10 ** (ord(site) - 96)), context)
        results.append(messages.open_message(aggregator.aggregate(context))[0])
    exact = torch.stack([random[s]["w"].double() for s in "abc"]).mean(0).float()
    for result in results:
        assert torch.equal(result["w"], exact)
        assert result["bn.num_batches_tracked"] == 3 and result["bn.num_batches_tracked"].dtype == torch.int64
        assert all(torch.equal(result[name], results[0][name]) for name in results[0])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop("w"), "tensor 'w' is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor 'extra' is not part of the shared state"),
        (lambda t: t.update(w=torch.zeros(3, 2)), "shape [3, 2], not [2, 3]"),
        (lambda t: t.update(w=torch.zeros(2, 3, dtype=torch.float64)), "type float64, not float32"),
        (lambda t: t["w"].__setitem__((0, 0), float("nan")), "not finite"),
        (lambda t: t.update(w="text"), "is a str, not a tensor"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(tmp_path: Path, change, reason: str) -> None:
    aggregator, context = started_aggregator(tmp_path)
    bad = toy_state(1.0)
    change(bad)
    assert aggregator.accept(answer("site-a", toy_state(4.0)), context)
    assert not aggregator.accept(answer("site-b", bad), context)
    assert reason in aggregator.refused["site-b"]
    assert list(aggregator.metrics) == ["site-a"]
    assert torch.equal(messages.open_message(aggregator.aggregate(context))[0]["w"], torch.full((2, 3), 4.0))


def test_late_early_and_repeated_answers_are_refused(tmp_path: Path) -> None:
    aggregator, context = started_aggregator(tmp_path, round_=3)
    assert not aggregator.accept(answer("site-a", toy_state(), round_=2), context)
    assert "it answers round 2, this is round 3" in aggregator.refused["site-a"]
    assert not aggregator.accept(answer("site-b", toy_state(), round_=3, round=2), context)
    assert "of round 2" in aggregator.refused["site-b"]
    assert aggregator.accept(answer("site-c", toy_state(2.0), round_=3), context)
    assert not aggregator.accept(answer("site-c", toy_state(9.0), round_=3), context)
    assert "site-c" not in aggregator.refused  # its first answer counts
    assert torch.equal(messages.open_message(aggregator.aggregate(context))[0]["w"], torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Shareable(), "it answers round None"),
        (answer("site-a", toy_state(), method="other"), "it is of method 'other'"),
        (answer("site-a", toy_state(), samples="many"), "it could not be read"),
        (answer("site-a", toy_state(), metrics=["no"]), "it could not be read"),
    ],
)
def test_garbage_is_refused_without_an_exception(tmp_path: Path, message: Shareable, reason: str) -> None:
    aggregator, context = started_aggregator(tmp_path)
    assert not aggregator.accept(message, context)
    assert reason in next(iter(aggregator.refused.values()))


def test_before_the_first_round_nothing_is_accepted(tmp_path: Path) -> None:
    from flare_toys import fake_context
    from heterosync.flare.aggregator import EqualWeightAggregator

    aggregator = EqualWeightAggregator("hsl")
    assert not aggregator.accept(answer("site-a", toy_state()), fake_context(tmp_path))
    assert aggregator.refused == {"site-a": "no round has begun"}


def test_contributions_wait_on_disk_and_a_new_round_forgets_them(tmp_path: Path) -> None:
    aggregator, context = started_aggregator(tmp_path)
    aggregator.accept(answer("site-a", toy_state(1.0)), context)
    assert len(list((tmp_path / "contributions").iterdir())) == 1
    context.set_prop(AppConstants.CURRENT_ROUND, 1, private=True, sticky=False)
    aggregator.handle_event(AppEventType.ROUND_STARTED, context)
    assert aggregator.metrics == {} and aggregator.refused == {} and aggregator.payload == {}
    assert aggregator.accept(answer("site-a", toy_state(3.0), round_=1), context)
    assert torch.equal(messages.open_message(aggregator.aggregate(context))[0]["w"], torch.full((2, 3), 3.0))
    aggregator.handle_event(EventType.END_RUN, context)
    assert not (tmp_path / "contributions").exists()


def test_tensors_offloaded_by_flare_are_read_when_needed(tmp_path: Path) -> None:
    class Lazy:
        def __init__(self, value: torch.Tensor):
            self.value = value

        def materialize(self) -> torch.Tensor:
            return self.value

    aggregator, context = started_aggregator(tmp_path)
    assert aggregator.accept(answer("site-a", {n: Lazy(v) for n, v in toy_state(5.0).items()}), context)
    assert torch.equal(messages.open_message(aggregator.aggregate(context))[0]["w"], torch.full((2, 3), 5.0))


def test_offloaded_junk_is_refused_without_being_read(tmp_path: Path) -> None:
    class Huge:
        def materialize(self) -> torch.Tensor:
            raise MemoryError

    aggregator, context = started_aggregator(tmp_path)
    assert not aggregator.accept(answer("site-a", {**toy_state(), "junk": Huge()}), context)
    assert aggregator.refused == {"site-a": "tensor 'junk' is not part of the shared state"}


def test_a_method_without_shared_tensors_sends_metrics_only(tmp_path: Path) -> None:
    aggregator, context = started_aggregator(tmp_path, method="local")
    assert aggregator.accept(answer("site-a", {}, method="local"), context)
    assert not aggregator.accept(answer("site-b", toy_state(), method="local"), context)
    assert aggregator.metrics == {"site-a": {"val_auc_received": 0.5}}
    assert messages.open_message(aggregator.aggregate(context)) == ({}, {})


def test_a_late_answer_does_not_change_a_closed_round(tmp_path: Path) -> None:
    aggregator, context = started_aggregator(tmp_path)
    assert aggregator.accept(answer("site-a", toy_state(2.0)), context)
    aggregator.close()
    assert not aggregator.accept(answer("site-b", toy_state(4.0)), context)
    assert torch.equal(messages.open_message(aggregator.aggregate(context))[0]["w"], torch.full((2, 3), 2.0))
    assert not aggregator.accept(answer("site-c", toy_state(4.0)), context)
    assert aggregator.refused == dict.fromkeys(("site-b", "site-c"), "the round is closed")
    assert list(aggregator.metrics) == list(aggregator.payload) == ["site-a"]


@pytest.mark.parametrize("metrics", [{"auc": float("nan")}, {"patient": 1.0}, {"auc": "0.5"}])
def test_scalars_that_no_site_may_send_are_refused(tmp_path: Path, metrics: dict) -> None:
    aggregator, context = started_aggregator(tmp_path)
    assert not aggregator.accept(answer("site-a", toy_state(), metrics=metrics), context)
    assert aggregator.refused["site-a"].startswith("it holds what no site may send: metric ")


@pytest.mark.parametrize(
    ("error", "cause"), [(UserError("server, round 3: it diverges"), "server, round 3: it diverges"), (None, "")]
)
def test_long_work_of_the_server_ends_with_its_job_or_in_one_line(tmp_path: Path, monkeypatch, error, cause) -> None:
    """An abort while the method works is no failure; what it refuses is the job's cause, without a traceback."""
    aggregator, context = started_aggregator(tmp_path)
    assert aggregator.accept(answer("site-a", toy_state()), context)
    signal, panics, beats = Signal(), [], []

    def work(_: object) -> dict:
        if error is not None:
            raise error
        pulse.beat()
        signal.trigger(True)
        beats.append("one")
        pulse.beat()
        raise AssertionError("the second beat ends it")

    monkeypatch.setattr(Server, "result", work)
    monkeypatch.setattr(context, "get_run_abort_signal", lambda: signal)
    monkeypatch.setattr(aggregator, "system_panic", lambda reason, _: panics.append(reason))
    assert messages.open_message(aggregator.aggregate(context))[0] == {}
    assert panics == ([cause] if cause else []) and beats == ([] if cause else ["one"])

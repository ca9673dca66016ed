"""Signals: noted while steps are made, obeyed at a step's end."""

import os
import signal

import pytest
from accelerate import Accelerator

from qloop.distributed.stops import Request, StopRequest
from qloop.errors import StoppedError


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_noted_once_and_stays(accelerator, number):
    with StopRequest() as stop:
        stop.is_running = True
        assert stop.agreed(accelerator) is None
        send(number)
        assert stop.agreed(accelerator) == Request(number.name, stops=True)
        assert stop.agreed(accelerator) == Request(number.name, stops=True)


def test_a_save_is_asked_for_once(accelerator):
    with StopRequest() as stop:
        stop.is_running = True
        send(signal.SIGUSR1)
        assert stop.agreed(accelerator) == Request("SIGUSR1", stops=False)
        assert stop.agreed(accelerator) is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_outweighs_a_save(accelerator, number):
    with StopRequest() as stop:
        stop.is_running = True
        send(number)
        send(signal.SIGUSR1)
        assert stop.agreed(accelerator) == Request(number.name, stops=True)


def test_a_second_interrupt_leaves_now(accelerator):
    with StopRequest() as stop:
        stop.is_running = True
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_a_second_sigterm_is_as_good_as_one(accelerator):
    with StopRequest() as stop:
        stop.is_running = True
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.agreed(accelerator) == Request("SIGTERM", stops=True)


def stop_while_loading(number: int) -> None:
    """Gets a signal inside of a library that takes every Exception for a failure of its own."""
    with StopRequest():
        try:
            send(number)
        except Exception as error:
            raise OSError("cannot load the tokenizer") from error
        pytest.fail("still here")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_the_first_step_a_stop_ends_the_run_at_once(number):
    with pytest.raises(StoppedError, match=f"{number.name}: stopped between") as error:
        stop_while_loading(number)
    assert error.value.exit_code == 75


def test_a_save_before_the_first_step_waits_for_it(accelerator):
    with StopRequest() as stop:
        send(signal.SIGUSR1)
        stop.is_running = True
        assert stop.agreed(accelerator) == Request("SIGUSR1", stops=False)


def test_the_handlers_of_before_are_put_back():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopRequest():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before

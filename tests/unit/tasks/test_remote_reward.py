"""A reward server: one request for a group, repeated only for faults that may pass. The server is a real one."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import pytest

from megatron_rl.config import TaskConfig
from megatron_rl.errors import UserError
from megatron_rl.tasks import make_task, remote_reward
from megatron_rl.tasks.make_reward import make_reward
from megatron_rl.tasks.reward import Response, Score
from megatron_rl.types import Prompt
from tests.http_server import ThreadedServer
from tests.unit.tasks.char_tokenizer import char_tokenizer

PROMPT = Prompt("p7", "1+1=", (4, 5), "2", metadata={"level": 3})
RESPONSES = [Response("2", (6,)), Response("3", (7, 8))]
TASK = make_task(TaskConfig(), char_tokenizer(), seed=0, max_prompt_tokens=16)
GOOD = (200, {"rewards": [1, {"score": 0.5, "length": 2}]})


class Server:
    """A server that gives the next of `answers` to each request, the last one again and again.

    An answer is (status, JSON value or text), or a number of seconds to wait before the next answer.
    """

    def __init__(self) -> None:
        self.answers: list = [GOOD]
        self.bodies: list = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answer = outer.answers.pop(0) if len(outer.answers) > 1 else outer.answers[0]
                if isinstance(answer, float):
                    time.sleep(answer)
                    answer = GOOD
                status, value = answer
                content = (value if isinstance(value, str) else json.dumps(value)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None: ...

        self.http = ThreadedServer(Handler)
        self.url = f"{self.http.url}/score"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(monkeypatch) -> Iterator[Server]:
    monkeypatch.setattr(remote_reward, "PAUSES_S", (0.01, 0.02, 0.04))
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def scores(url: str, prompt: Prompt = PROMPT, **keys) -> list[Score]:
    reward = make_reward(TaskConfig(reward=url, **keys), TASK)
    try:
        return reward.scores(prompt, RESPONSES)
    finally:
        reward.close()


def test_one_request_has_the_whole_group(server):
    assert scores(server.url) == [Score(1.0), Score(0.5, {"length": 2.0})]
    common = {"id": "p7", "prompt": "1+1=", "metadata": {"level": 3}, "answer": "2"}
    assert server.bodies == [
        {"prompts": [{**common, "response": "2", "tokens": [6]}, {**common, "response": "3", "tokens": [7, 8]}]}
    ]


def test_a_status_of_5xx_is_tried_again(server):
    server.answers = [(500, "down"), (503, "busy"), GOOD]
    assert scores(server.url)[0] == Score(1.0) and len(server.bodies) == 3


def test_a_server_that_stays_down_is_an_error_with_url_and_prompt(server):
    server.answers = [(500, "down")]
    message = r"task.reward http://.*/score responded with status 500, 4 times in a row, for a response to prompt 'p7'"
    with pytest.raises(UserError, match=message):
        scores(server.url)
    assert len(server.bodies) == 4
    assert scores(server.url, reward_on_error="zero") == [Score(0.0, failed=True)] * 2


def test_nothing_listens_there(server):
    with pytest.raises(UserError, match=r"task.reward http://127.0.0.1:1/x cannot be reached \(ConnectError"):
        scores("http://127.0.0.1:1/x")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((400, "no such model"), "responded with status 400: no such model"),
        ((307, ""), "responded with status 307"),
        ((200, "<html>"), "responded with '<html>', which is no JSON"),
        ((200, [1, 2]), r"responded with \[1, 2\]; {'rewards': \[2 rewards\]} is expected"),
        ((200, {"rewards": [1]}), r"responded with {'rewards': \[1\]}; {'rewards': \[2 rewards\]} is expected"),
        ((200, {"rewards": [1, "x"]}), "returned 'x', a str"),
        ((200, '{"rewards": [1, NaN]}'), "which is not finite"),
    ],
)
def test_a_wrong_answer_is_an_error_at_once(server, answer, message):
    server.answers = [answer]
    with pytest.raises(UserError, match=message):
        scores(server.url)
    assert len(server.bodies) == 1


def test_a_server_that_hangs_is_an_error_in_time(server):
    server.answers = [5.0]
    started = time.monotonic()
    with pytest.raises(UserError, match=r"took longer than task.reward_timeout_s: 0.5"):
        scores(server.url, reward_timeout_s=0.5)
    assert time.monotonic() - started < 3 and len(server.bodies) <= 1


def test_metadata_that_is_no_json_is_an_error_also_where_errors_count_zero(server):
    odd = Prompt("p8", "q", (1,), "", metadata={"image": b"png"})
    with pytest.raises(UserError, match=r"prompt 'p8' cannot be sent as JSON: .*bytes"):
        scores(server.url, odd, reward_on_error="zero")
    assert server.bodies == []

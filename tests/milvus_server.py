"""A Milvus standalone server for tests: free ports, a folder of its own, ended by its process id.

`python tests/milvus_server.py FOLDER` becomes the server, so that the process id of the command is that of the server;
the kernel kills it when the process that started it ends. A second start in the same folder has the same ports and
data. Requests need the token root:Milvus, since Milvus listens at all addresses of the machine."""
import ctypes
import json
import os
import signal
import socket
import sys
from pathlib import Path

TOKEN = "root:Milvus"
PORTS = ["proxy", "proxy_internal", "etcd", "root_coord", "data_coord", "data_node", "query_coord", "query_node",
         "index_coord", "index_node"]


def free_ports(names):
    "A port that nobody uses for each name."
    held = {name: socket.socket() for name in names}
    for s in held.values(): s.bind(("127.0.0.1", 0))
    ports = {name: s.getsockname()[1] for name, s in held.items()}
    for s in held.values(): s.close()
    return ports


def ports_of(folder):
    "The ports of the server in this folder, chosen at its first start."
    path = folder/"ports.json"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(json.dumps(free_ports([*PORTS, "etcd_peer", "metrics"])))
        part.rename(path)
    return json.loads(path.read_text())


def write_etcd(folder, ports):
    "The configuration of the embedded metadata store, which would take fixed ports otherwise."
    client, peer = (f"http://127.0.0.1:{ports[name]}" for name in ("etcd", "etcd_peer"))
    about = {"name": "default",
             "data-dir": str(folder/"etcd"),
             "listen-client-urls": client,
             "advertise-client-urls": client,
             "listen-peer-urls": peer,
             "initial-advertise-peer-urls": peer,
             "initial-cluster": f"default={peer}"}
    (folder/"etcd.yaml").write_text(json.dumps(about))  # YAML has JSON in it


def become_server(folder):
    "Write the configuration, unpack the server from its package, and become it."
    import milvus
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    config, ports = milvus.MilvusServerConfig(data_dir=str(folder)), ports_of(folder)
    config.resolve_storage()
    for name in PORTS: config.set(f"{name}_port", ports[name])
    config.set("authorization_enabled", True)
    config.set("common.session.ttl", 10)  # seconds until a killed server is forgotten, 30 by default
    # milliseconds; collections load sooner
    for name in ("checkInterval", "distPullInterval"): config.set(f"queryCoord.{name}", 100)
    config.write_config()
    milvus._initialize_data_files(str(folder))
    write_etcd(folder, ports)
    os.chdir(folder)
    own = dict(DEPLOY_MODE="STANDALONE", METRICS_PORT=str(ports["metrics"]), MILVUS_RUN_DIR=str(folder/"run"),
               ETCD_CONFIG_PATH=str(folder/"etcd.yaml"), LD_LIBRARY_PATH=str(folder/"bin"))
    os.execve(folder/"bin"/"milvus", ["milvus", "run", "standalone"], os.environ | own)


if __name__ == "__main__": become_server(Path(sys.argv[1]))

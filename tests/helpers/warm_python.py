"""An interpreter that has imported everything already: commands that start others take a second each, not ten.

What counts there is what the commands do and how they are started, not what a fresh interpreter imports.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
import threading
from collections.abc import Iterator

import pytest
from processes import context

#: Stands for `python -m MODULE …`: hands over its words, variables, folder and streams, and ends as the module ends.
CLIENT = """\
#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"-"], [0, 1, 2])
server.sendall(json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode())
server.shutdown(socket.SHUT_WR)
sys.exit(int(server.recv(9) or 1))
"""
START_METHOD = multiprocessing.get_start_method()


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The path of an interpreter for `-m`; the commands that it runs have it as `sys.executable`."""
    folder = tmp_path_factory.mktemp("warm")
    client, address = folder / "python", str(folder / "socket")
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        threading.Thread(target=_serve, args=(listener,), daemon=True).start()
        yield str(client)
        listener.shutdown(socket.SHUT_RDWR)


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:  # the fixture has ended
            return
        threading.Thread(target=_wait_for, args=(connection,), daemon=True).start()


def _wait_for(connection: socket.socket) -> None:
    with connection:
        process = context().Process(target=_run, args=(connection,))
        process.start()
        process.join()
        connection.sendall(str(process.exitcode).encode())


def _run(connection: socket.socket) -> None:
    gc.freeze()  # what the server has imported is no garbage to look for
    _, streams, *_ = socket.recv_fds(connection, 1, 3)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    (client, *words), variables, folder = json.load(connection.makefile())
    connection.close()
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    name = words.index("-m") + 1
    sys.executable, sys.argv = client, words[name:]
    sys.path[:0] = [folder, *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    sys.stdout.reconfigure(line_buffering=True)
    multiprocessing.set_start_method(START_METHOD, force=True)  # not that of the process which has started this one
    sys.modules.pop(words[name], None)  # as it runs anew, under the name of __main__
    runpy.run_module(words[name], run_name="__main__", alter_sys=True)

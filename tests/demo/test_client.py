"""Does the client say in one readable sentence what the server or a node refused?"""

import json

import pytest

from personalize.demo import client


def test_a_refusal_names_the_node_and_the_reason():
    body = {"error": {"message": "Prompt outputs failed validation", "details": ""}, "node_errors": {}}
    body["node_errors"]["5"] = {
        "class_type": "KSampler",
        "errors": [{"message": "Value not in list", "details": "scheduler: 'x'"}],
    }
    assert client.refusal(json.dumps(body).encode(), {}) == "KSampler (node 5): Value not in list: scheduler: 'x'"


def test_a_failed_node_is_named_with_its_own_message():
    detail = {"node_type": "KSampler", "node_id": "5", "exception_message": "no such thing\n"}
    with pytest.raises(client.HostError, match=r"^KSampler \(node 5\): no such thing$"):
        client.succeeded({"status": {"status_str": "error", "messages": [["execution_error", detail]]}})

"""Dialogues and the chat template, by a worker that has no more than what users install."""

import json

from qwen_jax.roles import ASSISTANT, TEMPLATE, USER
from qwen_jax.shards import load_shard

DIALOGUE = [{"role": "user", "content": "Two colours?"}, {"role": "assistant", "content": "Red and blue."}]


def test_a_dialogue_and_a_task_in_the_chat_template(workspace, tmp_path):
    stream = tmp_path / "stream.jsonl"
    task = workspace.stream.read_text().splitlines()[0]
    stream.write_text(json.dumps({"task_id": "talk", "messages": DIALOGUE}) + f"\n{task}\n")
    workspace.run("--chat_template", stream=stream)
    (talk, solved) = load_shard(workspace.shards()[0])[0]
    assert {TEMPLATE, USER, ASSISTANT} <= set(talk["token_roles"].tolist())
    assert TEMPLATE in solved["token_roles"] and len(solved["token_cells"])

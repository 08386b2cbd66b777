"""Review decisions: written at once, kept through crashes, the latest counts."""

import json
import threading

import pytest

from captioner import storage
from captioner.errors import OutputError
from captioner.output import decisions
from captioner.output.decisions import ConflictError, Journal, read_decisions


def test_decisions_are_there_at_once_and_after_the_journal_is_closed(place):
    journal = Journal(place)
    accepted = journal.decide("/a.jpg", "accepted", None, seen=0)
    edited = journal.decide("/b.jpg", "edited", "a cat", seen=0)

    expected = {"/a.jpg": accepted, "/b.jpg": edited}
    assert read_decisions(place) == expected
    journal.close()
    assert read_decisions(place) == expected
    assert storage.names(f"{place}/__captioner/review") == []
    again = Journal(place)
    rejected = again.decide("/a.jpg", "rejected", None, seen=accepted.revision)
    assert read_decisions(place) == expected | {"/a.jpg": rejected}


def test_a_decision_taken_back_counts_no_more_also_after_closing(place):
    journal = Journal(place)
    made = journal.decide("/a.jpg", "accepted", None, seen=0)
    journal.close()
    journal.decide("/a.jpg", None, None, seen=made.revision)

    assert read_decisions(place) == {}
    journal.close()
    assert read_decisions(place) == {}
    assert Journal(place)["/a.jpg"].revision > made.revision


def test_a_decision_on_what_the_reviewer_did_not_see_is_refused(tmp_path):
    journal = Journal(str(tmp_path))
    made = journal.decide("/a.jpg", "edited", "a cat", seen=0)

    with pytest.raises(ConflictError) as caught:
        journal.decide("/a.jpg", "rejected", None, seen=0)

    assert caught.value.current == made
    assert read_decisions(str(tmp_path)) == {"/a.jpg": made}


def test_what_a_crash_left_before_the_deletion_changes_nothing(tmp_path, monkeypatch):
    journal = Journal(str(tmp_path))
    made = journal.decide("/a.jpg", "accepted", None, seen=0)
    monkeypatch.setattr(storage, "delete", lambda _: (_ for _ in ()).throw(OutputError("full")))
    with pytest.raises(OutputError):
        journal.close()

    assert read_decisions(str(tmp_path)) == {"/a.jpg": made}


def test_two_servers_keep_each_others_decisions(tmp_path):
    one, other = Journal(str(tmp_path)), Journal(str(tmp_path))
    one.decide("/a.jpg", "accepted", None, seen=0)
    other.decide("/b.jpg", "rejected", None, seen=0)
    one.close()
    other.close()

    assert {uri: each.decision for uri, each in read_decisions(str(tmp_path)).items()} == {
        "/a.jpg": "accepted",
        "/b.jpg": "rejected",
    }


def test_many_decisions_are_brought_together_meanwhile(tmp_path, monkeypatch):
    monkeypatch.setattr(decisions, "_COMPACTED_AFTER", 10)
    journal = Journal(str(tmp_path))

    def decide(worker: int) -> None:
        for number in range(25):
            journal.decide(f"/{worker}-{number}.jpg", "accepted", None, seen=0)

    threads = [threading.Thread(target=decide, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(read_decisions(str(tmp_path))) == 100
    assert len(storage.names(f"{tmp_path}/__captioner/review")) < 10


@pytest.mark.parametrize("data", [b"{", b"[]", json.dumps({"uri": "/a.jpg"}).encode()])
def test_a_damaged_journal_is_one_line(tmp_path, data):
    storage.write(f"{tmp_path}/__captioner/review/1.json", data)

    with pytest.raises(OutputError, match="cannot read the review decisions") as caught:
        read_decisions(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_decisions_are_read_while_a_server_brings_them_together(tmp_path, monkeypatch):
    place = str(tmp_path)
    journal = Journal(place)
    made = journal.decide("/a.jpg", "accepted", None, seen=0)
    read_parquet = decisions._read_parquet

    def read_then_compact(output: str) -> list[decisions.Decision]:
        found = read_parquet(output)
        monkeypatch.setattr(decisions, "_read_parquet", read_parquet)
        journal.close()
        return found

    monkeypatch.setattr(decisions, "_read_parquet", read_then_compact)

    assert read_decisions(place) == {"/a.jpg": made}

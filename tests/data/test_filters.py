import pytest

from captioner.data.filters import PROGRAMS_FILES, Exclusion


@pytest.mark.parametrize(
    ("pattern", "matches", "others"),
    [
        ("old", ["old", "a/b/old"], ["older", "old/a.jpg", "OLD", "a/old.jpg"]),
        ("old/", ["old", "a/old"], ["older"]),
        ("*-draft.jpg", ["a-draft.jpg", "x/-draft.jpg"], ["a-draft.jpeg", "a-draft.jpg/b"]),
        ("?.jpg", ["a.jpg", "x/é.jpg"], ["ab.jpg", ".jpg"]),
        ("[a-c].jpg", ["b.jpg"], ["d.jpg", "-.jpg"]),
        ("[!a-c].jpg", ["d.jpg"], ["b.jpg"]),
        ("[]].jpg", ["].jpg"], ["a.jpg"]),
        ("[[]1].jpg", ["[1].jpg"], ["1.jpg"]),
        ("[.jpg", ["[.jpg"], ["a.jpg"]),
        ("a+(b).jpg", ["a+(b).jpg"], ["aa(b).jpg"]),
        ("a/b", ["a/b"], ["x/a/b", "b", "a/b/c"]),
        ("/a", ["a"], ["x/a"]),
        ("a/*.jpg", ["a/1.jpg"], ["a/b/1.jpg", "1.jpg"]),
        ("a/**/*.jpg", ["a/1.jpg", "a/b/c/1.jpg"], ["1.jpg", "b/1.jpg"]),
        ("**/b/c", ["b/c", "a/b/c"], ["c", "b/d/c"]),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a"]),
        ("line\nbreak*", ["line\nbreak\n.jpg"], ["line break"]),
    ],
)
def test_a_pattern_matches_names_or_paths(pattern: str, matches: list[str], others: list[str]):
    exclusion = Exclusion(["never", pattern, "nor/this"])
    assert [exclusion.match(path) for path in matches] == [pattern] * len(matches)
    assert [exclusion.match(path) for path in others] == [None] * len(others)


def test_without_patterns_nothing_matches():
    assert Exclusion([]).match("a") is None


def test_files_of_other_programs_match_and_photos_do_not():
    exclusion = Exclusion(PROGRAMS_FILES)
    for path in ("._a.jpg", "x/._a.jpg", "x/.ipynb_checkpoints", ".Trash-1000", ".Trashes"):
        assert exclusion.match(path) is not None
    for path in ("a.jpg", ".a.jpg", "_a.jpg", "a._b.jpg", ".hidden", "Trash", "a lost+found"):
        assert exclusion.match(path) is None

"""The filters and the order of a page: read from a URL, written as a URL and as SQL."""

import urllib.parse
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["PAGE", "SORTS", "View"]

PAGE = 48  #: rows per page

#: The orders by their names in a URL: a label, and the SQL expression.
SORTS = {
    "listed": ("listing order", "__row"),
    "best": ("highest score first", "score DESC NULLS LAST, __row"),
    "worst": ("lowest score first", "score ASC NULLS LAST, __row"),
    "longest": ("longest caption first", "length(caption) DESC NULLS LAST, __row"),
    "shortest": ("shortest caption first", "length(caption) ASC NULLS LAST, __row"),
    "random": ("random", "hash(__row + ?), __row"),
}

#: Columns that the index adds to the output's: the row's number, and its caption's words separated
#: by single spaces, without punctuation.
NUMBER, WORDS = "__row", "__words"

DECISIONS = ("accepted", "rejected", "edited", "undecided")
_DECIDED = "COALESCE(decisions.decision, 'undecided')"
_FROM = "captions LEFT JOIN decisions USING (uri)"
_SHOWN = (
    "__row, uri, caption, score, status, error, width, height, decision, edited, "
    "COALESCE(revision, 0) AS revision"
)


@dataclass(frozen=True, kw_only=True)
class View:
    """The rows that a page shows, and their order. Every field is a parameter of its URL."""

    status: tuple[str, ...] = ()
    decision: tuple[str, ...] = ()
    finish: tuple[str, ...] = ()
    words: str = ""  # all of these in the caption
    without: str = ""  # none of these in the caption
    least: float | None = None  # of the score
    most: float | None = None
    column: str = ""  # a column of the source, and the value that it has
    value: str = ""
    sort: str = "listed"
    seed: int = 0
    page: int = 1

    @classmethod
    def from_parameters(cls, parameters: Iterable[tuple[str, str]]) -> "View":
        """Reads a view from a URL's parameters; ignores invalid values."""
        lists: dict[str, list[str]] = {}
        for name, value in parameters:
            lists.setdefault(name, []).append(value)
        first = {name: values[0].strip() for name, values in lists.items()}
        sort = first.get("sort", "listed")
        return cls(
            status=tuple(lists.get("status", ())),
            decision=tuple(each for each in lists.get("decision", ()) if each in DECISIONS),
            finish=tuple(lists.get("finish", ())),
            words=first.get("words", ""),
            without=first.get("without", ""),
            least=_number(first.get("least")),
            most=_number(first.get("most")),
            column=first.get("column", ""),
            value=first.get("value", ""),
            sort=sort if sort in SORTS else "listed",
            seed=int(_number(first.get("seed")) or 0) % 2**31,
            page=max(1, int(_number(first.get("page")) or 1)),
        )

    def url(self, **changes: Any) -> str:
        """Returns the view, with some fields changed, as a URL's query string."""
        changed = replace(self, **changes)
        pairs: list[tuple[str, str]] = []
        for name, default in _DEFAULTS.items():
            value = getattr(changed, name)
            if value == default:
                continue
            values = value if isinstance(value, tuple) else (value,)
            pairs += [(name, str(each)) for each in values]
        return urllib.parse.urlencode(pairs, errors="surrogatepass")

    def toggled(self, name: str, value: str) -> str:
        """Returns the query string with a value of a filter added, or removed if it is set."""
        values = getattr(self, name)
        changed = tuple(v for v in values if v != value) if value in values else (*values, value)
        return self.url(**{name: changed, "page": 1})

    def page_of_rows(self, columns: Mapping[str, str]) -> tuple[str, list[Any]]:
        """SQL for the rows of the page."""
        where, parameters = self._where(columns)
        order = SORTS[self.sort][1]
        parameters += [self.seed] if "?" in order else []
        offset = (self.page - 1) * PAGE
        return (
            f"SELECT {_SHOWN} FROM {_FROM} WHERE {where} ORDER BY {order} "  # noqa: S608
            f"LIMIT {PAGE} OFFSET {offset}",
            parameters,
        )

    def neighbours(self, columns: Mapping[str, str], page: int) -> tuple[str, list[Any]]:
        """SQL for the ids of the rows of a page."""
        sql, parameters = replace(self, page=page).page_of_rows(columns)
        return f"SELECT __row FROM ({sql})", parameters  # noqa: S608

    def count(self, columns: Mapping[str, str]) -> tuple[str, list[Any]]:
        """SQL for the number of rows of all pages."""
        where, parameters = self._where(columns)
        return f"SELECT count(*) AS rows FROM {_FROM} WHERE {where}", parameters  # noqa: S608

    def facet(self, name: str, columns: Mapping[str, str]) -> tuple[str, list[Any]]:
        """SQL for the number of rows for each value of a filter, with the other filters applied."""
        where, parameters = self._where(columns, ignored=name)
        expression = _DECIDED if name == "decision" else f'captions."{name}"'
        return (
            f"SELECT {expression} AS value, count(*) AS rows FROM {_FROM} "  # noqa: S608
            f"WHERE {where} GROUP BY 1 ORDER BY 2 DESC, 1",
            parameters,
        )

    def _where(self, columns: Mapping[str, str], ignored: str = "") -> tuple[str, list[Any]]:
        """The WHERE condition and its parameters, without the filter named by ``ignored``.

        Every value is a parameter; every column name is checked against ``columns``.
        """
        terms = ["TRUE"]
        parameters: list[Any] = []
        for name, expression in (
            ("status", "status"),
            ("decision", _DECIDED),
            ("finish", "finish"),
        ):
            values = getattr(self, name)
            if values and name != ignored and (name in columns or name == "decision"):
                terms.append(f"{expression} IN ({', '.join('?' * len(values))})")
                parameters += values
        shown = f"COALESCE({words_of('edited')}, {WORDS})"
        for text, negated in ((self.words, False), (self.without, True)):
            for word in text.lower().split():
                found = f"contains({shown}, ?)"
                terms.append(f"NOT COALESCE({found}, FALSE)" if negated else found)
                parameters.append(f" {word} ")
        if self.least is not None:
            terms.append("score >= ?")
            parameters.append(self.least)
        if self.most is not None:
            terms.append("score <= ?")
            parameters.append(self.most)
        if self.column in columns and self.value:
            name = self.column.replace('"', '""')
            terms.append(f'CAST(captions."{name}" AS VARCHAR) = ?')
            parameters.append(self.value)
        return " AND ".join(terms), parameters


def words_of(column: str) -> str:
    """SQL for the words of a text, in lower case, with a space before and after each."""
    return f"' ' || translate(lower({column}), '.,;:!?\"()', '         ') || ' '"


_DEFAULTS = {name: getattr(View(), name) for name in View.__dataclass_fields__}


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if abs(value) < 1e12 else None

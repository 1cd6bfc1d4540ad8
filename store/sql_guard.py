"""Decides which SQL a user may run: one SELECT over the tables of the history, of functions known to be harmless.

The decision is made on the parse tree, because the text and even the statement type mislead: since DuckDB 2.0
``WITH x AS (INSERT …) SELECT`` counts as a SELECT. Everything is refused that is not listed here. The guard is the
first of several layers; the files are read-only and the process that runs the query has limits of its own.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator
from difflib import get_close_matches
from typing import Any, NamedTuple

import duckdb
import msgspec

from helmr.errors import TooLarge, UsageError
from store.question import MAX_SQL
from store.schema import VISIBLE

_HINT = "a query is one SELECT over " + ", ".join(sorted(VISIBLE))

_NODES_NAMES = """
SELECT_NODE SET_OPERATION_NODE RECURSIVE_CTE_NODE CTE_NODE
ORDER_MODIFIER LIMIT_MODIFIER LIMIT_PERCENT_MODIFIER DISTINCT_MODIFIER
ORDER_DEFAULT ORDER_ASCENDING ORDER_DESCENDING ASCENDING DESCENDING
BASE_TABLE SUBQUERY JOIN TABLE_FUNCTION EXPRESSION_LIST EMPTY SHOW_REF PIVOT
"""
_NODES = frozenset(_NODES_NAMES.split())
_EXPRESSIONS_NAMES = """
COLUMN_REF CONSTANT PARAMETER FUNCTION OPERATOR COMPARISON CONJUNCTION CASE CAST BETWEEN SUBQUERY WINDOW STAR LAMBDA LAMBDA_REF
POSITIONAL_REFERENCE COLLATE TYPE
"""
_EXPRESSIONS = frozenset(_EXPRESSIONS_NAMES.split())

#: Functions that make rows. As scalars ``range`` and ``generate_series`` are refused: they build lists of any length.
TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})

_FUNCTIONS_NAMES = """
!= % & * ** + - ->> -> / // < <-> << <= <=> <@ = > >= >> @ @> ^ ^@ | || ~ ~~ ~~* ~~~ !~~ !~~* && !__postfix
like_escape ilike_escape not_like_escape not_ilike_escape

abs acos acosh add asin asinh atan atan2 atanh bit_count cbrt ceil ceiling cos cosh cot degrees divide even exp
factorial fdiv floor fmod gamma gcd greatest greatest_common_divisor isfinite isinf isnan lcm least
least_common_multiple lgamma ln log log10 log2 mod multiply nextafter pi pow power radians random round round_even
roundbankers setseed sign signbit sin sinh sqrt subtract tan tanh trunc xor

ascii bar base64 bin bit_length char_length character_length chr concat concat_ws contains decode encode ends_with
formatreadabledecimalsize formatreadablesize format_bytes from_base64 from_binary from_hex hash hex instr
jaro_similarity jaro_winkler_similarity lcase left length len lower ltrim md5 octet_length ord overlay
parse_dirname parse_dirpath parse_filename parse_formatted_bytes parse_path position prefix regexp_escape
regexp_extract regexp_extract_all regexp_full_match regexp_matches regexp_replace regexp_split_to_array replace
reverse right rtrim sha1 sha256 split split_part starts_with str_split str_split_regex strip_accents strlen strpos
string_split string_split_regex string_to_array substr substring suffix to_base64 to_binary to_hex translate trim
ucase unbin unhex unicode upper url_decode url_encode nfc_normalize pg_size_pretty

age ago century current_date current_localtime current_localtimestamp date_add date_diff date_part date_sub
date_trunc datediff datepart datesub datetrunc day dayname dayofmonth dayofweek dayofyear days_in_month decade epoch
epoch_ms epoch_ns epoch_us era get_current_time get_current_timestamp hour isodow isoyear julian last_day make_date
make_time make_timestamp make_timestamp_ms make_timestamp_ns make_timestamptz microsecond millennium millisecond
minute month monthname nanosecond normalized_interval now quarter second strftime strptime time_bucket timezone
timezone_hour timezone_minute to_centuries to_days to_decades to_hours to_microseconds to_millennia to_milliseconds
to_minutes to_months to_quarters to_seconds to_timestamp to_weeks to_years today transaction_timestamp try_strptime
week weekday weekofyear year yearweek

array_aggr array_aggregate array_append array_apply array_cat array_concat array_contains array_distinct
array_extract array_filter array_has array_has_all array_has_any array_indexof array_intersect array_length
array_pop_back array_pop_front array_position array_prepend array_push_back array_push_front array_reduce
array_reverse array_reverse_sort array_slice array_sort array_to_json array_to_string array_transform array_unique
array_value array_zip cardinality element_at filter flatten list_aggr list_aggregate list_any_value list_append
list_apply list_avg list_cat list_concat list_contains list_count list_distinct list_element list_extract
list_filter list_first list_has list_has_all list_has_any list_indexof list_intersect list_last list_max
list_median list_min list_mode list_pack list_position list_prepend list_product list_reduce list_reverse
list_reverse_sort list_select list_slice list_sort list_stddev_pop list_stddev_samp list_string_agg list_sum
list_transform list_unique list_value list_var_pop list_var_samp list_where list_zip map map_concat map_contains
map_entries map_extract map_extract_value map_from_entries map_keys map_values reduce row struct_concat
struct_contains struct_extract struct_extract_at struct_has struct_insert struct_keys struct_pack struct_update
struct_values unnest apply

from_json from_json_strict json json_array json_array_length json_contains json_deep_merge json_exists json_extract
json_extract_path json_extract_path_text json_extract_string json_group_array json_group_object
json_group_structure json_keys json_merge_patch json_normalize json_object json_pretty json_quote json_strip_nulls
json_structure json_transform json_transform_strict json_type json_valid json_value row_to_json to_json
variant_array_length variant_contains variant_exists variant_extract variant_extract_string variant_keys
variant_type variant_typeof

can_cast_implicitly coalesce gen_random_uuid if ifnull nullif switch typeof uuid uuid_extract_timestamp uuidv4 uuidv7
version error constant_or_null

any_value approx_count_distinct approx_quantile approx_top_k arbitrary arg_max arg_max_null arg_min arg_min_null
argmax argmin array_agg avg bit_and bit_or bit_xor bool_and bool_or corr count count_if count_star countif covar_pop
covar_samp entropy favg first fsum geomean geometric_mean group_concat histogram histogram_exact kahan_sum kurtosis
kurtosis_pop last list listagg mad max max_by mean median min min_by mode product quantile quantile_cont
quantile_disc regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy regr_syy
reservoir_quantile sem skewness stddev stddev_pop stddev_samp string_agg sum sumkahan var_pop var_samp variance wavg
weighted_avg

cume_dist dense_rank fill first_value lag last_value lead nth_value ntile percent_rank rank rank_dense row_number
"""
#: Scalar, aggregate and window functions. Left out on purpose, besides all that reads files, settings or the catalog:
#: functions that make a huge value of a few bytes (repeat, lpad, format, list_resize …) or take quadratic time
#: (levenshtein …), because DuckDB neither counts their memory nor can interrupt them.
FUNCTIONS = frozenset(_FUNCTIONS_NAMES.split())

_AT_CLAUSE = re.compile(rb"at\s*\(|at\s+time\s+zone\b", re.IGNORECASE)

#: Names of CTEs that would hide a view of the system from the check of table names.
_RESERVED = re.compile(r"(duckdb|pragma|sqlite|pg|information_schema|character_sets)_?", re.IGNORECASE)


class Checked(NamedTuple):
    """A statement that may run: its text, and which of the visible tables it reads."""

    sql: str
    tables: frozenset[str]


#: Parses SQL: ``json_serialize_sql``, decoded.
Parser = Callable[[str], dict[str, Any]]


def check(sql: str, parse: Parser, parameters: Collection[str] = ()) -> Checked:
    """Let a statement pass, or refuse it; ``parameters`` are the names that have a value, for ``$name`` and ``?``.

    Raises:
        UsageError: it does not parse, is no SELECT, or uses what is not allowed; ``details`` has ``position`` and
            ``excerpt`` with a caret where DuckDB tells them.
        TooLarge: the text is too long.
    """
    if len(sql.encode()) > MAX_SQL:
        raise TooLarge(f"the query is {len(sql.encode())} bytes long; {MAX_SQL} are allowed")
    if "\0" in sql:
        raise UsageError("the query contains a NUL character")
    explained, original = _explained(sql)
    body, quoted = quote_at(original)
    tree = parse(body)
    if tree["error"]:
        raise syntax_error(original, tree, quoted)
    statements = tree["statements"]
    if len(statements) != 1:
        raise UsageError(f"the query has {len(statements)} statements, not one", hint=_HINT)
    found = _Walk()
    try:
        found.visit(statements[0])
        found.require_tables()
    except UsageError as error:
        raise _placed(error, original, quoted) from None
    _match_parameters(found.parameters, set(parameters))
    return Checked(f"EXPLAIN {body}" if explained else body, frozenset(found.tables.keys() & VISIBLE))


def _explained(sql: str) -> tuple[bool, str]:
    """EXPLAIN has no parse tree of its own: what it explains must pass. ANALYZE would run it, unbounded by row caps."""
    body = sql.strip().rstrip(";").rstrip()
    match = re.match(r"explain\s+(?!analy[sz]e\b|\()", body, re.IGNORECASE)
    return (True, body[match.end() :]) if match else (False, body)


def quote_at(sql: str) -> tuple[str, list[int]]:
    """Put ``at`` in quotes wherever it must be the column; also the places where that was done, in bytes of the result.

    Events, logs and records have a column ``at``, and since DuckDB 2.0 that is a word of its grammar (``AT TIME ZONE``,
    ``AT (VERSION …)``).
    """
    text = sql.encode()
    starts = [offset for offset, _ in duckdb.tokenize(sql)]
    made, quoted, done = bytearray(), [], 0
    for start, end in itertools.pairwise([*starts, len(text)]):
        if text[start:end].strip().lower() == b"at" and not _AT_CLAUSE.match(text, start):
            made += text[done:start]
            quoted.append(len(made))
            made += b'"at"'
            done = start + 2
    return (made + text[done:]).decode(), quoted


def syntax_error(sql: str, tree: dict[str, Any], quoted: list[int]) -> UsageError:
    """The error of a parser that gave up; with the line and a caret, where it says where.

    ``quoted``: where two quotes were put in before the text was parsed.
    """
    message = str(tree.get("error_message", "the query cannot be parsed")).replace('""at""', '"at"')
    if tree.get("error_type") == "not implemented":
        return UsageError("only SELECT is possible here: the history is read-only", hint=_HINT)
    if not str(tree.get("position", "")).isdigit():
        return UsageError(message)
    return UsageError(message, details=_place(sql, int(tree["position"]), quoted))


def _place(sql: str, told: int, quoted: list[int]) -> dict[str, Any]:
    """Where a byte of the parsed text is in the text as it was written."""
    at = told - 2 * sum(place < told for place in quoted)
    position = len(sql.encode()[: max(at, 0)].decode(errors="ignore"))
    return {"position": position, "excerpt": excerpt(sql, position)}


def _placed(error: UsageError, sql: str, quoted: list[int]) -> UsageError:
    """The error with its place, if the node it is about has one."""
    told = error.details.get("location")
    place = _place(sql, told, quoted) if told is not None and told <= len(sql.encode()) + 2 * len(quoted) else {}
    return UsageError(error.message, hint=error.hint, details=place)


def excerpt(sql: str, position: int) -> str:
    """The line of ``position``, and a caret below it; a long line is cut around it."""
    start = sql.rfind("\n", 0, position) + 1
    line = sql[start:].partition("\n")[0]
    column = position - start
    skip = max(0, column - 60)
    return f"{line[skip : skip + 120]}\n{' ' * (column - skip)}^"


def _match_parameters(used: set[str], given: set[str]) -> None:
    if missing := used - given:
        name = min(missing)
        raise UsageError(f"the query's parameter ${name} has no value", hint=f"give it: --param {name}=VALUE")
    if unused := given - used:
        known = ", ".join(f"${name}" for name in sorted(used)) or "none"
        raise UsageError(f"the query has no parameter ${min(unused)}", hint=f"its parameters: {known}")


def _unknown_table(name: str, location: int | None) -> UsageError:
    close = get_close_matches(name, sorted(VISIBLE), n=1)
    meant = f"did you mean {close[0]!r}? " if close else ""
    return UsageError(f"there is no table {name!r} here", hint=meant + _HINT, details={"location": location})


class _Walk:
    """Visits every node of a parse tree and refuses what is not listed."""

    def __init__(self) -> None:
        self.tables: dict[str, int | None] = {}  #: and where each is named first
        self.ctes: set[str] = set()
        self.parameters: set[str] = set()

    def require_tables(self) -> None:
        """Refuse a table that is neither one of the history's nor made by the query itself."""
        for name, location in self.tables.items():
            if name not in self.ctes and name not in VISIBLE:
                raise _unknown_table(name, location)

    def visit(self, node: Any) -> None:
        """Check the node and all below it."""
        pending = [node]
        while pending:
            present = pending.pop()
            if isinstance(present, dict):
                pending.extend(self._dict(present))
            elif isinstance(present, list):
                pending.extend(present)

    def _dict(self, node: dict[str, Any]) -> Iterator[Any]:
        kind, expression = node.get("type"), node.get("class")
        if expression is not None:
            self._expression(node, str(expression))
        elif isinstance(kind, str):
            self._node(node, kind)
        if isinstance(node.get("map"), list):
            self._name_ctes(node["map"])
        for key, value in node.items():
            if key == "function" and kind == "TABLE_FUNCTION":
                self._table_function(value)
                yield value.get("arguments")
            else:
                yield value

    def _expression(self, node: dict[str, Any], expression: str) -> None:
        if expression not in _EXPRESSIONS:
            message = f"{expression.lower()} expressions are not possible here"
            raise UsageError(message, hint=_HINT, details=_location(node))
        if expression == "PARAMETER":
            self.parameters.add(str(node["identifier"]).lower())
        name = node.get("function_name")
        if name is not None and str(name).lower() not in FUNCTIONS:
            raise _refused_function(str(name), node)

    def _node(self, node: dict[str, Any], kind: str) -> None:
        if kind not in _NODES:
            what = kind.removesuffix("_QUERY_NODE").replace("_", " ")
            raise UsageError(f"{what} is not possible here: the history is read-only", hint=_HINT)
        if kind == "BASE_TABLE":
            self._table(node)
        elif kind == "SHOW_REF" and node.get("query") is None and node.get("table_name") != '"tables"':
            raise UsageError("of SHOW, only SHOW TABLES is possible here; DESCRIBE a table to see its columns")

    def _table(self, node: dict[str, Any]) -> None:
        qualified = node.get("catalog_name") or node.get("schema_name") not in {"", "main", None}
        if qualified or len(node["qualified_name"]["path"]) > 2 or node.get("at_clause"):
            path = ".".join(node["qualified_name"]["path"])
            message = f"{path}: tables are named without a database or schema here"
            raise UsageError(message, hint=_HINT, details=_location(node))
        self.tables.setdefault(str(node["table_name"]).lower(), node.get("query_location"))

    def _name_ctes(self, entries: list[Any]) -> None:
        for entry in entries:
            name = str(entry.get("key", "")).lower()
            if _RESERVED.match(name) or name in _SYSTEM_VIEWS:
                raise UsageError(f"a CTE cannot be named {name!r}")
            self.ctes.add(name)

    @staticmethod
    def _table_function(function: dict[str, Any]) -> None:
        name = str(function.get("function_name", "")).lower()
        if function.get("class") != "FUNCTION" or name not in TABLE_FUNCTIONS:
            raise _refused_function(name, function)


_SYSTEM_VIEWS_NAMES = """
character_sets columns constraint_column_usage constraint_table_usage key_column_usage schemata check_constraints
referential_constraints tables table_constraints views
"""
#: Views of DuckDB's own that are found without a schema and have no telling prefix.
_SYSTEM_VIEWS = frozenset(_SYSTEM_VIEWS_NAMES.split())


def _refused_function(name: str, node: dict[str, Any]) -> UsageError:
    return UsageError(
        f"the function {name} is not possible here",
        hint="functions that read files or settings, or that make huge values, are left out",
        details=_location(node),
    )


def _location(node: dict[str, Any]) -> dict[str, Any]:
    return {"location": node.get("query_location")}


def duckdb_parser(execute: Callable[[str, list[str]], Any]) -> Parser:
    """A parser over a DuckDB connection's ``execute``."""

    def parse(sql: str) -> dict[str, Any]:
        row = execute("SELECT json_serialize_sql(?::VARCHAR)", [sql]).fetchone()
        tree: dict[str, Any] = msgspec.json.decode(row[0])
        return tree

    return parse

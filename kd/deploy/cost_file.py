"""Read what ``kd cost`` computes with: a file of conf/cost or of the user, checked first. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

from kd.config.rules import Rule, number, refusals, refuse, shown, whole
from kd.deploy.cost import Cost, Prices, Volume
from kd.errors import KdError, did_you_mean

_PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = (_PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf") / "cost"

CODES = frozenset(
    """AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CLP
    CNY COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR
    ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT
    MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD
    SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD UYU UZS VES VND
    VUV WST XAF XCD XOF XPF YER ZAR ZMW ZWG""".split()  # noqa: SIM905  (a list of 154 literals is no clearer)
)
"""Currencies of ISO 4217 that are money in use; funds, metals and test codes are left out."""
SIGNS = frozenset("€$£¥₹₩₺₽₪₫₴₦₱฿₡₲₵₸₼₾")

AMOUNT = number(above=0)
RULES = {
    "volume.requests": AMOUNT,
    **dict.fromkeys(("volume.tokens_in", "volume.tokens_out"), AMOUNT.or_null),
    "volume.unit": Rule("a text", lambda value: isinstance(value, str) and bool(value.strip())),
    **{
        f"{who}.{key}": rule
        for who in ("student", "teacher")
        for key, rule in {
            **dict.fromkeys(("price_in", "price_out", "price_per_hour", "requests_per_second"), AMOUNT.or_null),
            "machines": whole(1).or_null,
            "fixed": number(least=0),
        }.items()
    },
    "start": Rule("a day, YYYY-MM-DD, or null", lambda value: value is None or type(value) is date),
}
PARTS: Mapping[str, type] = {"volume": Volume, "student": Prices, "teacher": Prices}
BY_TOKENS, BY_HOUR = ("price_in", "price_out"), ("price_per_hour", "requests_per_second")


def read(source: str, overrides: Sequence[str] = ()) -> Cost:
    """Read the inputs of a cost from a name of conf/cost or a YAML file, and change some keys, ``KEY=VALUE``.

    ``KdError`` names each key that is unknown or missing, and each value that is not allowed.
    """
    from kd.records import yaml_text  # start-up: yaml

    node, where = yaml_text.mapping(_located(source)), f"cost = {source}: "
    for override in overrides:
        _set(node, override)
    names = [*(one.name for one in fields(Cost))]
    refuse([f"{where}there is no key {key}{did_you_mean(key, names)}" for key in node if key not in names])
    for part, kind in PARTS.items():
        if not isinstance(node.get(part), dict):
            raise KdError(f"{where}{part} = {shown(node.get(part))} is not allowed: it must be a mapping of keys")
        known = [one.name for one in fields(kind)]
        refuse([f"{where}there is no key {part}.{k}{did_you_mean(k, known)}" for k in node[part] if k not in known])
    refuse([f"{where}{key} is missing" for key in ("currency", "volume.requests") if not _has(node, key)])
    problems = (*_of_currency(node["currency"]), *refusals("", node, RULES), *_of_training(node), *_of_prices(node))
    refuse([where + problem for problem in problems])
    training = {str(name): float(amount) for name, amount in (node.get("training") or {}).items()}
    parts = {part: kind(**node[part]) for part, kind in PARTS.items()}
    return Cost(node["currency"], training=training, start=node.get("start"), **parts)


def names() -> list[str]:
    """Return the names in conf/cost."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def _located(source: str) -> Path:
    if source in names():
        return FOLDER / f"{source}.yaml"
    if Path(source).is_file():
        return Path(source)
    known = f"a name of conf/cost ({', '.join(names())}) or a YAML file"
    raise KdError(f"cost = {source} is not allowed: it must be {known}{did_you_mean(source, names())}")


def _set(node: dict[str, Any], override: str) -> None:
    """Set ``volume.requests=20000``; the value is read as YAML."""
    import yaml

    from kd.records import yaml_text  # start-up: as yaml

    key, _, text = override.partition("=")
    *sections, last = key.split(".")
    try:
        value = yaml_text.load(text)
    except yaml.YAMLError:
        raise KdError(f"{override} is not understood: the value is not valid YAML") from None
    for section in sections:
        if not isinstance(node.get(section), dict):
            known = [name for name in (*PARTS, "training") if isinstance(node.get(name), dict)]
            raise KdError(f"{override}: there is no key {key}{did_you_mean(section, known)}")
        node = node[section]
    node[last] = value


def _has(node: Mapping[str, Any], key: str) -> bool:
    part, _, name = key.partition(".")
    return node.get(part) is not None and (not name or node[part].get(name) is not None)


def _of_currency(currency: Any) -> list[str]:
    if isinstance(currency, str) and (currency in CODES or currency in SIGNS):
        return []
    near = did_you_mean(str(currency).upper(), CODES)
    allowed = "a code of ISO 4217 (EUR, USD …) or a sign (€, $, £, ¥ …)"
    return [f"currency = {shown(currency)} is not allowed{near}: it must be {allowed}"]


def _of_training(node: Mapping[str, Any]) -> list[str]:
    training = node.get("training")
    if training is not None and not isinstance(training, dict):
        return [f"training = {shown(training)} is not allowed: it must be a mapping of amounts, {{machine: 120}}"]
    rule = number(least=0)
    return refusals("training.", training or {}, dict.fromkeys(map(str, training or {}), rule))


def _of_prices(node: Mapping[str, Any]) -> list[str]:
    """Say what is missing: a model is paid by tokens or by the hour, both keys of the one, none of the other."""
    found, by_tokens = [], []
    for who in ("student", "teacher"):
        given = [key for key in (*BY_TOKENS, *BY_HOUR) if node[who].get(key) is not None]
        if sorted(given) not in (sorted(BY_TOKENS), sorted(BY_HOUR)):
            found.append(
                f"{who} has {', '.join(given) or 'no price'}: it must have price_in and price_out (of a million "
                "tokens), or price_per_hour and requests_per_second"
            )
        elif "price_in" in given:
            by_tokens.append(who)
            if node[who].get("machines") is not None:
                found.append(f"{who}.machines is for prices per hour, and {who} is paid by tokens")
    missing = [key for key in ("tokens_in", "tokens_out") if by_tokens and node["volume"].get(key) is None]
    return [*found, *(f"volume.{key} is missing: {' and '.join(by_tokens)} is paid by tokens" for key in missing)]

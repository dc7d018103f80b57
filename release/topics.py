"""The topics of an audit, each with the field that speaks of it, in the order of Annex IV of the EU AI Act.

The order is that of points 1 to 9 of Regulation (EU) 2024/1689, Annex IV; beside each point stand controls of ISO/IEC
42001:2023, Annex A, and clauses. Each part of a point is a topic, recorded or not. A topic in its place is no legal
advice.
"""

from __future__ import annotations

from dataclasses import dataclass

REPORT, MANIFEST, ATTESTATION, HISTORY, RUN = (
    "report.json",
    "manifest.json",
    "attestation.intoto.jsonl",
    "history.jsonl",
    "the run's manifest.json",
)


@dataclass(frozen=True)
class Line:
    """A sentence. text: with {} for each slot; slots: a pointer (RFC 6901) into a document, with one of SHOWS behind |.

    each: the pointer of a list; the sentence is said of each entry, and slots are relative to that. other: what is said
    where a slot has no value.
    """

    topic: str
    text: str = ""
    document: str = ""
    slots: tuple[str, ...] = ()
    each: str = ""
    other: Line | None = None


@dataclass(frozen=True)
class Chapter:
    """A part of the document. annex: its place in Annex IV; iso: clauses and controls of ISO/IEC 42001, "" for none."""

    annex: str
    iso: str
    title: str
    lines: tuple[Line, ...]


def _line(topic: str, text: str, document: str, *slots: str, each: str = "", other: Line | None = None) -> Line:
    return Line(topic, text, document, slots, each, other)


CHAPTERS = (
    Chapter(
        "1",
        "A.6.2.7, A.8.2, A.9.4",
        "General description",
        (
            Line("Intended purpose, and who may use the system"),
            Line("Name of the provider"),
            _line(
                "Version, and the one before",
                "Version {} was {} in place of {}.",
                HISTORY,
                "/version",
                "/event",
                "/before",
                each="/",
            ),
            Line("Interaction with other hardware, software and AI systems"),
            _line("Model", "The model file has SHA-256 `{}`.", REPORT, "/candidate/model_sha256"),
            _line("Classes", "It tells {} classes apart: {}.", REPORT, "/data/classes|count", "/data/classes|list"),
            _line("Software", "It was judged with {}.", REPORT, "/versions|pairs"),
            _line("Hardware", "It was judged on {}.", REPORT, "/hardware|pairs"),
            _line("Weights", "Weights are stored as {}.", MANIFEST, "/weights"),
            Line("Forms in which it is placed on the market or put into service"),
            Line("Products that it is a component of"),
            Line("User interface for the deployer"),
            Line("Instructions for use"),
        ),
    ),
    Chapter(
        "2 (a) to (c)",
        "A.4.2, A.4.4, A.4.5, A.6.1.3, A.6.2.3",
        "Development: methods, design, architecture, resources",
        (
            Line("General logic, key design choices, and trade-offs"),
            _line("Code of the gate", "The code was at revision {}.", REPORT, "/code/revision"),
            _line("Run", "It was exported from a checkpoint with SHA-256 `{}`.", REPORT, "/run/checkpoint_sha256"),
            _line("Network", "The network is {}, width {}.", RUN, "/model/arch", "/model/width"),
            _line("Training", "It was trained with seed {} under {}.", RUN, "/seed", "/config/curriculum|pairs"),
            _line("Training software", "It was trained with {}.", RUN, "/versions|pairs"),
            _line("Training hardware", "It was trained on {}.", RUN, "/hardware|pairs"),
            _line(
                "Export",
                "On {} images logits of the served file and of its source differ by at most {}, of a tolerated {}.",
                MANIFEST,
                "/parity/images|count",
                "/parity/max_abs_difference",
                "/parity/tolerance",
            ),
        ),
    ),
    Chapter(
        "2 (d)",
        "A.4.3, A.7.2 to A.7.6",
        "Data",
        (
            _line("Training data", "It was trained on {}, SHA-256 `{}`.", RUN, "/data/name", "/data/sha256"),
            _line(
                "Test data",
                "It was judged on the {} part of {}, {} images, SHA-256 `{}`.",
                REPORT,
                "/data/part",
                "/data/name",
                "/data/images|count",
                "/data/sha256",
            ),
            _line("Preparation of images", "Files became images by {}.", REPORT, "/data/preprocessing"),
            Line("Provenance, collection, labelling and rights of the data"),
            Line("Examination of the data for biases"),
        ),
    ),
    Chapter("2 (e)", "A.9.2, A.9.3", "Human oversight", (Line("Assessment of the measures of human oversight"),)),
    Chapter("2 (f)", "clause 6.3, A.6.2.6", "Pre-determined changes", (Line("Pre-determined changes"),)),
    Chapter(
        "2 (g)",
        "A.6.2.4",
        "Validation and testing",
        (
            _line(
                "Threat model",
                "An attacker may change an image within {} {}.",
                REPORT,
                "/evaluation/threat/norm",
                "/evaluation/threat/label",
                other=_line(
                    "Threat model", "An attacker may change an image by {}.", REPORT, "/evaluation/threat/spelling"
                ),
            ),
            _line(
                "Attacks",
                "The attack {} was tried on {} images, and flipped {}.",
                REPORT,
                "/name",
                "/tried|count",
                "/flipped|count",
                each="/evaluation/attacks",
            ),
            _line(
                "Clean accuracy",
                "{} of {} images were right; exact 95 % interval of one look: {} to {}.",
                REPORT,
                "/evaluation/clean/k|count",
                "/evaluation/clean/n|count",
                "/evaluation/clean/lower_95|percent",
                "/evaluation/clean/upper_95|percent",
            ),
            _line(
                "Robust accuracy",
                "{} of {} images were right and stayed so under all attacks; exact 95 % interval of one"
                " look: {} to {}.",
                REPORT,
                "/evaluation/robust/k|count",
                "/evaluation/robust/n|count",
                "/evaluation/robust/lower_95|percent",
                "/evaluation/robust/upper_95|percent",
            ),
            Line("Potentially discriminatory impacts"),
            _line("Execution provider", "It was judged by {}.", REPORT, "/evaluation/about/provider"),
            _line(
                "Statistics",
                "Evidence is {}; {} of {} images were attacked.",
                REPORT,
                "/statistics/kind",
                "/statistics/attacked|count",
                "/statistics/population|count",
            ),
            _line("Criteria", "The criterion {} was {}.", REPORT, "/criterion", "/outcome", each="/criteria"),
            _line(
                "Bounds",
                "Of {} the gate's own bounds are {} to {}.",
                REPORT,
                "/criterion",
                "/lower|percent",
                "/upper|percent",
                each="/criteria",
            ),
            _line("Verdict", "The verdict is: {}.", REPORT, "/verdict"),
            _line("Policy", "It was decided by the policy with SHA-256 `{}`.", REPORT, "/policy/sha256"),
            _line("Checks of the evidence", "The check {} was {}.", REPORT, "/check", "/outcome", each="/checks"),
            _line("Date", "The gate ran on {}.", REPORT, "/created|day"),
            _line(
                "Signatures",
                "Key `{}` signed the robustness statement.",
                ATTESTATION,
                "/keyid",
                each="/robustness/signatures",
            ),
            _line(
                "Validity", "The signature holds until {}.", ATTESTATION, "/robustness/statement/predicate/expires|day"
            ),
        ),
    ),
    Chapter(
        "2 (h)",
        "",
        "Cybersecurity measures",
        (
            _line(
                "Bytes that were signed",
                "File {} has SHA-256 `{}`.",
                ATTESTATION,
                "/name",
                "/digest/sha256",
                each="/robustness/statement/subject",
            ),
            Line("Measures of the machines and networks that it runs on"),
        ),
    ),
    Chapter(
        "3",
        "A.5.4, A.6.2.6, A.8.2",
        "Monitoring, functioning and control",
        (
            _line(
                "Accuracy under other radii",
                "Under {} robust accuracy is {}.",
                REPORT,
                "/threat/label",
                "/robust/value|percent",
                each="/radii",
            ),
            _line(
                "Attacks that transfer",
                "Under attacks crafted on {} accuracy is {}, an upper bound of robust accuracy.",
                REPORT,
                "/about/surrogate",
                "/robust/value|percent",
                each="/transfer",
            ),
            Line("Accuracy for particular persons or groups"),
            Line("Other threats than the named ones, and images of no class"),
            Line("Foreseeable unintended outcomes, and risks to health, safety and rights"),
            Line("Measures of human oversight, and help to interpret the output"),
            _line(
                "Specification of input data",
                "It takes {} images of shape {}.",
                REPORT,
                "/candidate/input/dtype",
                "/candidate/input/shape|list",
            ),
        ),
    ),
    Chapter("4", "A.6.2.2, A.6.2.4", "Performance metrics", (Line("Appropriateness of the metrics"),)),
    Chapter("5", "clause 6.1, A.5.2 to A.5.5", "Risk management system", (Line("Risk management system"),)),
    Chapter(
        "6",
        "A.6.2.5, A.6.2.6",
        "Changes through the lifecycle",
        (
            _line(
                "Promotions",
                "On {} version {} was {} by {}.",
                HISTORY,
                "/time|day",
                "/version",
                "/event",
                "/actor",
                each="/",
            ),
        ),
    ),
    Chapter("7", "", "Harmonised standards", (Line("Harmonised standards and other solutions that were applied"),)),
    Chapter("8", "", "EU declaration of conformity", (Line("EU declaration of conformity"),)),
    Chapter(
        "9",
        "clause 9.1, A.6.2.6, A.8.3, A.8.4",
        "Performance in the post-market phase",
        (Line("System that evaluates the performance, and post-market monitoring plan"),),
    ),
)

"""The subjects of MMMU and CMMMU and the domains that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

UNKNOWN_SUBJECT = "unknown"


@dataclass(frozen=True)
class SubjectDomains:
    """Which subjects a domain has, and how the benchmark's code adds them up.

    `by_accuracy` says that it adds accuracies weighted by questions, and not right answers; that
    can differ in the last digit of a float, and so in the last digit that is printed.
    """

    domains: Mapping[str, tuple[str, ...]]
    pools_accuracies: bool

    def domain_of(self, subject: str) -> str:
        """Return the domain of a subject; of a domain itself too, and "unknown" of others."""
        for domain, subjects in self.domains.items():
            if subject == domain or subject in subjects:
                return domain
        return UNKNOWN_SUBJECT


# MMMU's `data_utils.py`; Psychology is in the humanities (Yi's own copy has it in science).
MMMU_DOMAINS = SubjectDomains(
    {
        "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
        "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
        "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
        "Health and Medicine": (
            "Basic_Medical_Science",
            "Clinical_Medicine",
            "Diagnostics_and_Laboratory_Medicine",
            "Pharmacy",
            "Public_Health",
        ),
        "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
        "Tech and Engineering": (
            "Agriculture",
            "Architecture_and_Engineering",
            "Computer_Science",
            "Electronics",
            "Energy_and_Power",
            "Materials",
            "Mechanical_Engineering",
        ),
    },
    pools_accuracies=True,
)

# The categories of CMMMU's files, and lmms-eval's map of their subcategories.
CMMMU_DOMAINS = SubjectDomains(
    {
        "艺术与设计": ("艺术", "艺术理论", "设计", "音乐"),
        "商业": ("会计", "经济", "金融", "管理", "营销"),
        "科学": ("生物", "化学", "地理", "数学", "物理"),
        "健康与医学": ("基础医学", "临床医学", "诊断学与实验室医学", "制药", "公共卫生"),
        "人文社会科学": ("历史", "文献学", "社会学", "心理学"),
        "技术与工程": (
            *("农业", "建筑学", "计算机科学", "电子学"),
            *("能源和电力", "材料", "机械工程"),
        ),
    },
    pools_accuracies=False,
)

SUBJECT_DOMAINS = {"mmmu": MMMU_DOMAINS, "cmmmu": CMMMU_DOMAINS}


def subject_or_category(task: str, subject: str, category: str) -> str:
    """Return the subject of a record where the benchmark's code knows it, else its category."""
    return subject if SUBJECT_DOMAINS[task].domain_of(subject) != UNKNOWN_SUBJECT else category


def subject_of_id(record_id: str) -> str:
    """Return the subject in an id: what stands between the first and the last underscore."""
    return "_".join(record_id.split("_")[1:-1])


def known_subject_of_id(task: str, record_id: str) -> str:
    """Return the subject that an id of the task tells: validation_Art_Theory_3 is of Art_Theory."""
    told = subject_of_id(record_id)
    return told if SUBJECT_DOMAINS[task].domain_of(told) != UNKNOWN_SUBJECT else UNKNOWN_SUBJECT

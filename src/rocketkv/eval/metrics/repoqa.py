"""RepoQA's metric as in SCBench: an answer is right if it is most similar to the right function of the repository.

Source: `repo_qa_utils.py` of SCBench (microsoft/MInference, MIT), after evalplus/repoqa.
"""

import re
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

from rocketkv.eval.metrics.official import library

THRESHOLD = 0.8

# Language: its grammar's package and function, and the pattern of a function in it.
GRAMMARS = {
    "python": ("tree_sitter_python", "language", "(function_definition name: (_)) @function"),
    "java": ("tree_sitter_java", "language", "(method_declaration name: (_)) @function"),
    "typescript": ("tree_sitter_typescript", "language_typescript", "(function_declaration name: (_)) @function"),
    "rust": ("tree_sitter_rust", "language", "(function_item name: (_)) @function"),
    "cpp": (
        "tree_sitter_cpp",
        "language",
        "(function_definition declarator: (function_declarator declarator: (identifier))) @function",
    ),
    "go": ("tree_sitter_go", "language", "(function_declaration name: (_)) @function"),
}
PACKAGES = ("nltk", "tree_sitter", *(package for package, _, _ in GRAMMARS.values()))


def repoqa(prediction: str, right: Collection[str], functions: Sequence[str], language: str) -> float:
    """Say whether the function most similar to the predicted one is a right one, by 0.8 at least.

    Args:
        prediction: a text with a function, in a fenced block if there is other text around it.
        right: the functions that are right: of `functions`, those of the right name.
        functions: all that are asked for in the repository.
        language: a key of `GRAMMARS`.

    Raises:
        InputError: a package is missing.
    """
    code = extract_function(prediction, language)
    best = max(functions, key=lambda function: similarity(code, function))  # max takes the first of equal ones
    return float(best in right and similarity(code, best) >= THRESHOLD)


def extract_function(text: str, language: str) -> str:
    """Return the first function in a fenced block, else the first block, else all of the text.

    Raises:
        InputError: a package is missing.
    """
    text = text.strip()
    blocks: list[str] = re.findall(r"^```(?:\w+)?\s*\n(.*?)(?=^```)```", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        data = block.encode()
        parser, cursor = _grammar(language)
        found = cursor.captures(parser.parse(data).root_node).get("function", [])
        if found:
            node = min(found, key=lambda node: node.start_byte)
            return data[node.start_byte : node.end_byte].decode()
    return blocks[0] if blocks else text


def similarity(candidate: str, reference: str) -> float:
    """Return the BLEU of the words of two functions, smoothed by the fourth method of Chen and Cherry.

    Raises:
        InputError: a package is missing.
    """
    bleu = library("nltk.translate.bleu_score")
    words = [re.split(r"\s+", text.strip()) for text in (candidate, reference)]
    smoothing = bleu.SmoothingFunction().method4
    return float(bleu.sentence_bleu([words[1]], words[0], smoothing_function=smoothing))


@cache
def _grammar(language: str) -> tuple[Any, Any]:
    """Return a parser and a cursor over the functions that the parser finds."""
    sitter = library("tree_sitter")
    package, function, pattern = GRAMMARS[language]
    grammar = sitter.Language(getattr(library(package), function)())
    return sitter.Parser(grammar), sitter.QueryCursor(sitter.Query(grammar, pattern))

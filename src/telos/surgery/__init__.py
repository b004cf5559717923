"""Change a trained model: grow it, shrink it, merge it, teach it new classes."""

from telos.surgery.novel_class import add_class, class_prototype, replace_classes

__all__ = ["add_class", "class_prototype", "replace_classes"]

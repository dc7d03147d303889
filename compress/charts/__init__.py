"""Charts as data: what is drawn, in colours that the colour-blind can tell apart, and no drawing.

`compress.charts.figure` makes a matplotlib figure of one, for papers; `compress.charts.svg` an SVG
for pages, without matplotlib.
"""

from compress.charts.chart import Bar, Bars, Curves, Picture, Segment, Series
from compress.charts.figure import draw, save
from compress.charts.svg import svg

__all__ = ["Bar", "Bars", "Curves", "Picture", "Segment", "Series", "draw", "save", "svg"]

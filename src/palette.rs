//! Colours of pictures: Okabe and Ito's (2008), which everybody can tell apart, but for black and yellow.

use plotters::style::RGBColor;

/// In the order in which they are taken.
pub const COLORS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
];

/* One instruction set: the three kernels for each element type, and their dispatch table. cpu.c includes this file once
 * for each set, with LEVEL (its name) and TARGET (the compiler's attribute for it) defined. */
#define TYPE 0
#include "elements.h"
#include "reduce.h"
#include "apply.h"
#include "clamp.h"
#undef TYPE
#define TYPE 1
#include "elements.h"
#include "reduce.h"
#include "apply.h"
#include "clamp.h"
#undef TYPE
#define TYPE 2
#include "elements.h"
#include "reduce.h"
#include "apply.h"
#include "clamp.h"
#undef TYPE
#define TYPE 3
#include "elements.h"
#include "reduce.h"
#include "apply.h"
#include "clamp.h"
#undef TYPE

#define OF_EACH_TYPE(operation)                                                                                       \
    {JOIN(operation, fp32, LEVEL), JOIN(operation, bf16, LEVEL), JOIN(operation, fp16, LEVEL),                        \
     JOIN(operation, fp64, LEVEL)}
#define TEXT_(name) #name
#define TEXT(name) TEXT_(name)

static const Level LEVEL = {TEXT(LEVEL), OF_EACH_TYPE(fold), OF_EACH_TYPE(scale), OF_EACH_TYPE(clamp)};

#undef OF_EACH_TYPE
#undef TEXT
#undef TEXT_
#undef LEVEL
#undef TARGET
#undef VECTOR
#undef LOAD_FP16
#undef STORE_FP16
#undef STORE_FP32

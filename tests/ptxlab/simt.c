/* The machine that runs a translated kernel: one thread a warp, and several CTAs (programs) at once.
 *
 * Each of a warp's 32 lanes has the number of the basic block that it runs next. The warp runs the lowest block that any
 * lane stands at, with all lanes that stand there, so that diverged lanes meet again; but lanes at an instruction that
 * lanes do together (a barrier, a shuffle) wait until no other lane can go on, as on a GPU. Within a block, one lane runs
 * after another up to the next instruction for the whole warp. The generated code follows this file and defines
 * run_warp(); SHARED_BYTES and STACK_BYTES are defined in front. */
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>

#define LANES(mask)                           \
    for (int lane = 0; lane < 32; lane++)     \
        if (((mask) >> lane) & 1)

enum { LANE_ENDED = -1 };

enum access { ACCESS_LOAD, ACCESS_STORE, ACCESS_ATOMIC };

/* The layouts of Fault and Launch are known to kernel.py. */
typedef struct {
    char reason[64];
    uint64_t address;
    uint32_t program[3];
    int32_t warp;
    int32_t instruction; /* index into the parsed kernel, or -1 */
} Fault;

typedef struct {
    const uint8_t *parameters; /* 8 bytes each */
    uint32_t grid[3];
    int32_t threads;        /* in a CTA */
    int32_t resident;       /* CTAs that run at once */
    int32_t jitter;         /* per cent of the synchronisation points that yield or sleep */
    int32_t range_count;    /* -1: accesses are not checked against ranges */
    const uint64_t *starts; /* sorted, and the ranges do not overlap */
    const uint64_t *ends;
    uint64_t seed; /* of the jitter */
} Launch;

typedef struct {
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    int expected, waiting;
    unsigned generation;
} Barrier;

typedef struct Grid Grid;

/* A place where CTAs run, one after another. */
typedef struct {
    Grid *grid;
    Barrier turn; /* between one CTA and the next */
    Barrier cta;  /* bar.sync */
    uint8_t *shared_memory;
    uint64_t next_program;
} Slot;

struct Grid {
    const Launch *launch;
    Slot *slots;
    int warps; /* in a CTA */
    uint64_t next_program, programs;
    bool failed;
    pthread_mutex_t fault_mutex;
    Fault *fault;
};

typedef struct {
    Grid *grid;
    Slot *slot;
    const uint8_t *parameters;
    int index; /* in the CTA */
    uint32_t program[3];
    uint64_t random;
    unsigned backward_jumps;
    jmp_buf abandon;
} Warp;

static void run_warp(Warp *warp);

static bool has_failed(Grid *grid)
{
    return __atomic_load_n(&grid->failed, __ATOMIC_RELAXED);
}

static void wake(Barrier *barrier)
{
    pthread_mutex_lock(&barrier->mutex);
    pthread_cond_broadcast(&barrier->changed);
    pthread_mutex_unlock(&barrier->mutex);
}

/* Every warp that waits, now or later, gives up. */
static void fail(Grid *grid)
{
    __atomic_store_n(&grid->failed, true, __ATOMIC_RELAXED);
    for (int i = 0; i < grid->launch->resident; i++) {
        wake(&grid->slots[i].turn);
        wake(&grid->slots[i].cta);
    }
}

/* Records the grid's first fault and leaves the kernel. */
static _Noreturn void fault(Warp *warp, const char *reason, int instruction, uint64_t address)
{
    Grid *grid = warp->grid;
    pthread_mutex_lock(&grid->fault_mutex);
    if (!has_failed(grid)) {
        Fault *report = grid->fault;
        snprintf(report->reason, sizeof report->reason, "%s", reason);
        memcpy(report->program, warp->program, sizeof report->program);
        report->address = address;
        report->warp = warp->index;
        report->instruction = instruction;
        fail(grid);
    }
    pthread_mutex_unlock(&grid->fault_mutex);
    longjmp(warp->abandon, 1);
}

/* ---- Synchronisation ---- */

static uint64_t next_random(Warp *warp) /* xorshift64 */
{
    warp->random ^= warp->random << 13;
    warp->random ^= warp->random >> 7;
    warp->random ^= warp->random << 17;
    return warp->random;
}

/* Disturbs the order in which warps proceed, so that a race shows in few runs. */
static void jitter(Warp *warp)
{
    int per_cent = warp->grid->launch->jitter;
    if (!per_cent || (int)(next_random(warp) % 100) >= per_cent)
        return;
    if (next_random(warp) & 1) {
        sched_yield();
    } else {
        struct timespec pause = {0, (long)(next_random(warp) % 200000)};
        nanosleep(&pause, NULL);
    }
}

/* Opens the barrier if all are there; the caller holds its mutex. */
static bool open_if_complete(Barrier *barrier)
{
    if (barrier->waiting < barrier->expected)
        return false;
    barrier->waiting = 0;
    barrier->generation++;
    pthread_cond_broadcast(&barrier->changed);
    return true;
}

/* A barrier of our own, since waiters must be able to leave when another warp faults. False: the grid has failed. */
static bool meet(Barrier *barrier, Grid *grid)
{
    bool intact = true;
    pthread_mutex_lock(&barrier->mutex);
    barrier->waiting++;
    if (!open_if_complete(barrier)) {
        unsigned generation = barrier->generation;
        while (generation == barrier->generation && (intact = !has_failed(grid)))
            pthread_cond_wait(&barrier->changed, &barrier->mutex);
    }
    pthread_mutex_unlock(&barrier->mutex);
    return intact;
}

/* bar.sync waits only for warps that have not returned. */
static void leave(Barrier *barrier)
{
    pthread_mutex_lock(&barrier->mutex);
    barrier->expected--;
    if (barrier->waiting)
        open_if_complete(barrier);
    pthread_mutex_unlock(&barrier->mutex);
}

static void cta_barrier(Warp *warp)
{
    jitter(warp);
    if (!meet(&warp->slot->cta, warp->grid))
        longjmp(warp->abandon, 1);
}

/* Loops that wait for another warp must let it run, and must end when it faults. */
static void jump_backward(Warp *warp)
{
    jitter(warp);
    if (++warp->backward_jumps % 1024 == 0) {
        if (has_failed(warp->grid))
            longjmp(warp->abandon, 1);
        sched_yield();
    }
}

/* ---- Memory ---- */

static inline uint64_t global_address(Warp *warp, uint64_t address, unsigned bytes, enum access access, int instruction)
{
    static const char *const OUT_OF_BOUNDS[] = {
        "out-of-bounds global load", "out-of-bounds global store", "out-of-bounds global atomic"};
    const Launch *launch = warp->grid->launch;
    if (address & (bytes - 1))
        fault(warp, "misaligned global access", instruction, address);
    if (launch->range_count >= 0) {
        int low = 0, high = launch->range_count; /* the number of ranges that start at or before the address */
        while (low < high) {
            int middle = (low + high) / 2;
            if (launch->starts[middle] <= address)
                low = middle + 1;
            else
                high = middle;
        }
        if (low == 0 || address + bytes > launch->ends[low - 1])
            fault(warp, OUT_OF_BOUNDS[access], instruction, address);
    }
    return address;
}

static inline uint64_t shared_address(Warp *warp, uint64_t address, unsigned bytes, enum access access, int instruction)
{
    (void)access;
    if (address & (bytes - 1))
        fault(warp, "misaligned shared access", instruction, address);
    if (address + bytes > SHARED_BYTES)
        fault(warp, "out-of-bounds shared access", instruction, address);
    return (uint64_t)(uintptr_t)(warp->slot->shared_memory + address);
}

/* ---- Instructions of a whole warp ---- */

/* A .sync instruction names the lanes that take part. Those that could come have come (see run_warp). */
static inline void require_members(Warp *warp, uint32_t mask, uint32_t members, uint32_t live, int instruction)
{
    if (mask != (members & live))
        fault(warp, "warp-wide instruction in divergent code", instruction, 0);
}

enum shuffle { SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_BFLY, SHUFFLE_IDX };

/* The lane that `lane` reads from; *in_range is the instruction's second, predicate result. */
static inline int shuffle_source(enum shuffle mode, int lane, uint32_t distance, uint32_t clamp, bool *in_range)
{
    int offset = distance & 31;
    int segment = (clamp >> 8) & 31;
    int last = (lane & segment) | (clamp & 31 & ~segment);
    int source = mode == SHUFFLE_UP     ? lane - offset
                 : mode == SHUFFLE_DOWN ? lane + offset
                 : mode == SHUFFLE_BFLY ? lane ^ offset
                                        : (lane & segment) | (offset & ~segment);
    *in_range = mode == SHUFFLE_UP ? source >= last : source <= last;
    return *in_range ? source : lane;
}

/* ---- The grid ---- */

typedef struct {
    Slot *slot;
    int warp, slot_index;
} WarpThread;

static void *warp_thread(void *argument)
{
    WarpThread *thread = argument;
    Slot *slot = thread->slot;
    Grid *grid = slot->grid;
    const Launch *launch = grid->launch;
    Warp warp = {.grid = grid, .slot = slot, .parameters = launch->parameters, .index = thread->warp};
    warp.random = (launch->seed + 1) * 0x9E3779B97F4A7C15 + (uint64_t)thread->slot_index * 7919 +
                  (uint64_t)thread->warp * 104729 + 1;
    for (;;) {
        if (thread->warp == 0) {
            slot->cta.expected = grid->warps;
            slot->next_program = __atomic_fetch_add(&grid->next_program, 1, __ATOMIC_RELAXED);
            memset(slot->shared_memory, 0xA5, SHARED_BYTES); /* so that what was never written shows */
        }
        if (!meet(&slot->turn, grid))
            return NULL;
        uint64_t program = slot->next_program;
        if (program >= grid->programs || has_failed(grid))
            return NULL;
        warp.program[0] = program % launch->grid[0];
        warp.program[1] = program / launch->grid[0] % launch->grid[1];
        warp.program[2] = program / launch->grid[0] / launch->grid[1];
        jitter(&warp);
        if (setjmp(warp.abandon))
            return NULL;
        run_warp(&warp);
        leave(&slot->cta);
        if (!meet(&slot->turn, grid))
            return NULL;
    }
}

static void create_barrier(Barrier *barrier, int expected)
{
    barrier->expected = expected;
    pthread_mutex_init(&barrier->mutex, NULL);
    pthread_cond_init(&barrier->changed, NULL);
}

static void destroy_barrier(Barrier *barrier)
{
    pthread_mutex_destroy(&barrier->mutex);
    pthread_cond_destroy(&barrier->changed);
}

static bool create_slot(Slot *slot, Grid *grid)
{
    slot->grid = grid;
    create_barrier(&slot->turn, grid->warps);
    create_barrier(&slot->cta, grid->warps);
    slot->shared_memory = aligned_alloc(128, (SHARED_BYTES + 127) / 128 * 128);
    return slot->shared_memory != NULL;
}

/* Runs the kernel. 0: done; 1: `report` says what fault a warp met; 2: out of memory or threads. */
int run_grid(Launch *launch, Fault *report)
{
    Grid grid = {.launch = launch, .warps = (launch->threads + 31) / 32, .fault = report};
    bool complete = true;
    int started = 0;
    grid.programs = (uint64_t)launch->grid[0] * launch->grid[1] * launch->grid[2];
    if ((uint64_t)launch->resident > grid.programs)
        launch->resident = (int32_t)grid.programs;
    int threads = launch->resident * grid.warps;
    WarpThread *warps = calloc(threads, sizeof *warps);
    pthread_t *handles = calloc(threads, sizeof *handles);
    grid.slots = calloc(launch->resident, sizeof *grid.slots);
    pthread_mutex_init(&grid.fault_mutex, NULL);
    for (int i = 0; i < launch->resident; i++)
        complete &= create_slot(&grid.slots[i], &grid);

    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    for (; complete && started < threads; started += complete) {
        int slot = started / grid.warps;
        warps[started] = (WarpThread){&grid.slots[slot], started % grid.warps, slot};
        complete = pthread_create(&handles[started], &attributes, warp_thread, &warps[started]) == 0;
    }
    if (!complete) /* the warps that did start would wait for the others for ever */
        fail(&grid);
    for (int i = 0; i < started; i++)
        pthread_join(handles[i], NULL);

    pthread_attr_destroy(&attributes);
    for (int i = 0; i < launch->resident; i++) {
        destroy_barrier(&grid.slots[i].turn);
        destroy_barrier(&grid.slots[i].cta);
        free(grid.slots[i].shared_memory);
    }
    pthread_mutex_destroy(&grid.fault_mutex);
    free(grid.slots);
    free(handles);
    free(warps);
    return !complete ? 2 : grid.failed ? 1 : 0;
}
